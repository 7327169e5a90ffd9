"""Bodies that are refused before anyone parses them: too large, or not JSON."""

from __future__ import annotations

from email.message import Message

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from peft_dist.api.errors import ApiError


class BodyMiddleware:
    """413 for a body above ``max_bytes``, 415 for one that is not plain JSON.

    Asking for ``application/json`` also keeps other sites' pages from posting here through a visitor's
    browser without a preflight, which nothing here answers.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(Headers(scope=scope))
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        content_type = headers.get("content-type", "")
        if not _is_json(content_type):
            got = f"not {content_type!a}" if content_type else "the header is missing"
            return _unsupported(f"send the body as 'Content-Type: application/json' ({got})")
        encoding = headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            return _unsupported(f"Content-Encoding {encoding!a} is not supported: send the body as it is")
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length) > self._max_bytes:
            return ApiError(413, self._too_large(), code="request_too_large", headers={"Connection": "close"})
        return None

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def limited() -> AsgiMessage:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, self._too_large(), headers={"Connection": "close"})
            return message

        return limited

    def _too_large(self) -> str:
        return f"the body is larger than {self._max_bytes} bytes: send less, or raise the server's limit"


def _unsupported(message: str) -> ApiError:
    return ApiError(415, message, code="unsupported_media_type")


def _is_json(content_type: str) -> bool:
    message = Message()
    message["content-type"] = content_type
    charset = message.get_content_charset("utf-8")
    return message.get_content_type() == "application/json" and charset in ("utf-8", "utf8", "us-ascii")
