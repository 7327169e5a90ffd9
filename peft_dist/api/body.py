"""Bodies that are refused before anyone parses them: too large, too many at once, too slow, or not JSON."""

from __future__ import annotations

import asyncio
from email.message import Message

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as AsgiMessage

from peft_dist.api.auth import ADMIN_PREFIX
from peft_dist.api.errors import ApiError

MAX_HELD_BYTES = 256 << 20
MAX_KEPT_BYTES = 1 << 30
_HELD = "peft_dist.held_body"


class _Held:
    """Bytes of one body: they count as held until its request is admitted, and as kept until it is answered."""

    def __init__(self, middleware: BodyMiddleware) -> None:
        self._middleware = middleware
        self._is_admitted = False
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._middleware.num_held += num_bytes
        self._middleware.num_kept += num_bytes

    def release(self) -> None:
        if not self._is_admitted:
            self._is_admitted = True
            self._middleware.num_held -= self.num_bytes

    def end(self) -> None:
        self.release()
        self._middleware.num_kept -= self.num_bytes


def release(scope: Scope) -> None:
    """The request was admitted: the next ones may be read."""
    if _HELD in scope:
        scope[_HELD].release()


class BodyMiddleware:
    """413 for a body above ``max_bytes``, 415 for one that is not plain JSON, 408 for one of which nothing comes.

    Asking for ``application/json`` also keeps other sites' pages from posting here through a visitor's
    browser without a preflight, which is answered for pages of ``cors_origins`` alone.

    The queue bounds requests only once their prompts are read. Until then their bodies may have ``max_held`` bytes
    together; whoever sends more gets 429. Nor may those of all requests have more than ``max_kept`` until they are
    answered: the framework keeps what it read as long.

    Attributes:
        num_held: Bytes of requests that are not admitted yet.
        num_kept: Of all.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        seconds: float,
        max_held: int = MAX_HELD_BYTES,
        max_kept: int = MAX_KEPT_BYTES,
    ) -> None:
        """``seconds``: For which a client may send nothing of its body."""
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds
        # One alone is always taken.
        self._max_held = max(max_held, max_bytes)
        self._max_kept = max(max_kept, max_bytes)
        self.num_held = 0
        self.num_kept = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope["path"], Headers(scope=scope))
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        held = scope[_HELD] = _Held(self)
        try:
            await self._app(scope, self._limited(receive, held), send)
        finally:
            held.end()

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        content_type = headers.get("content-type", "")
        if not content_type and path.startswith(ADMIN_PREFIX) and _is_empty_and_no_pages(headers):
            # Nothing need be said there, but by a page, which could send it without asking whether it may.
            return None
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

    def _limited(self, receive: Receive, held: _Held) -> Receive:
        is_whole = False

        async def limited() -> AsgiMessage:
            nonlocal is_whole
            if is_whole:
                # What comes now is the client's end, for which nobody need hurry.
                return await receive()
            try:
                async with asyncio.timeout(self._seconds):
                    message = await receive()
            except TimeoutError as error:
                reason = f"nothing of the body came for {self._seconds:g} seconds: send it again, without a pause"
                raise HTTPException(408, reason, headers={"Connection": "close"}) from error
            is_whole = not message.get("more_body", False)
            held.add(len(message.get("body", b"")))
            if held.num_bytes > self._max_bytes:
                raise HTTPException(413, self._too_large(), headers={"Connection": "close"})
            if self.num_held > self._max_held:
                raise _crowded("being read", self._max_held)
            if self.num_kept > self._max_kept:
                raise _crowded("not answered yet", self._max_kept)
            return message

        return limited

    def _too_large(self) -> str:
        return f"the body is larger than {self._max_bytes} bytes: send less, or raise the server's limit"


def _crowded(which: str, most: int) -> HTTPException:
    reason = f"bodies of requests that are {which} have more than {most} bytes: try again later"
    return HTTPException(429, reason, headers={"Connection": "close", "Retry-After": "1"})


def _unsupported(message: str) -> ApiError:
    return ApiError(415, message, code="unsupported_media_type")


def _is_empty_and_no_pages(headers: Headers) -> bool:
    has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
    return not has_body and "origin" not in headers


def _is_json(content_type: str) -> bool:
    message = Message()
    message["content-type"] = content_type
    charset = message.get_content_charset("utf-8")
    return message.get_content_type() == "application/json" and charset in ("utf-8", "utf8", "us-ascii")
