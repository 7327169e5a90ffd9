"""Who may call what. Keys are compared in constant time and never logged or echoed."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from peft_dist.api.errors import ApiError
from peft_dist.api.options import ServerOptions

ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})
ADMIN_PREFIX = "/admin/"
# Outside of /v1, where other servers have them: they cost this one as much as what is inside.
TOKENIZER_PATHS = frozenset({"/tokenize", "/detokenize"})
_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-real-ip")


class AuthMiddleware:
    """Checks the key before a byte of the body is read.

    ``/v1``, ``/tokenize`` and ``/detokenize`` need one of the API keys (or the admin key) when there are any. Loading
    and unloading, and ``/admin``, need the admin key; without one they need an API key when there are any, and a client
    on this machine.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app = app
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await refusal.response()(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        path: str = scope["path"]
        if path not in ("/v1", *TOKENIZER_PATHS) and not path.startswith(("/v1/", ADMIN_PREFIX)):
            return None
        token = _bearer_token(Headers(scope=scope))
        options = self._options
        is_admin = options.admin_key is not None and _matches_any(token, (options.admin_key,))
        if path in ADMIN_PATHS or path.startswith(ADMIN_PREFIX):
            if options.admin_key is not None:
                return None if is_admin else _admin_key_needed(token, _matches_any(token, options.api_keys))
            if not is_local_client(scope):
                return ApiError(
                    403,
                    f"{path} answers only to clients on the server's machine: start the server with --admin-key "
                    "and send that key to use it from elsewhere",
                    code="admin_only",
                )
        if options.api_keys and not is_admin and not _matches_any(token, options.api_keys):
            return _key_needed(token)
        return None


def is_local_client(scope: Scope) -> bool:
    """True for a peer on the loopback interface that does not speak for someone else.

    Headers can only take this trust away: a request that a proxy passed on, or that a browser sends for a
    page from elsewhere, is not local although its connection is.
    """
    headers = Headers(scope=scope)
    if any(name in headers for name in _PROXY_HEADERS):
        return False
    origin = headers.get("origin")
    if origin is not None and not _is_loopback(urlsplit(origin).hostname or ""):
        return False
    client = scope.get("client")
    return client is not None and _is_loopback(client[0])


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _bearer_token(headers: Headers) -> bytes | None:
    # Back to the bytes of the wire, which Starlette decodes as Latin-1. Stripped as text they would lose the
    # ends of UTF-8 characters that look like Latin-1's no-break space.
    scheme, _, token = headers.get("authorization", "").encode("latin-1").partition(b" ")
    return token.strip() or None if scheme.lower() == b"bearer" else None


def _matches_any(token: bytes | None, keys: Iterable[str]) -> bool:
    # Every key is compared in full, so that timing tells neither which one nor how much of it was right.
    # Clients send a key in UTF-8; surrogates stand for the bytes of a variable or option that is not UTF-8.
    matches = [hmac.compare_digest(token or b"", key.encode("utf-8", "surrogateescape")) for key in keys]
    return any(matches)


def _key_needed(token: bytes | None) -> ApiError:
    return _unauthorised("the API key is wrong" if token else "an API key is needed")


def _unauthorised(problem: str) -> ApiError:
    return ApiError(
        401,
        f"{problem}: send it as 'Authorization: Bearer KEY'",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _admin_key_needed(token: bytes | None, has_api_key: bool) -> ApiError:
    if token is None or not has_api_key:
        problem = "the admin key is wrong" if token else "the admin key is needed"
        return _unauthorised(problem)
    return ApiError(
        403, "an API key does not load or unload adapters, or drain replicas: send the admin key", code="admin_only"
    )
