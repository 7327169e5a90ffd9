"""Answers that end when their client does: server-sent events, and JSON that takes a while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peft_dist.api.errors import as_api_error, encode_json
from peft_dist.core.errors import PeftDistError

T = TypeVar("T")
SendEvents = Callable[[bytes], Awaitable[None]]
logger = logging.getLogger(__name__)

_SEND = "peft_dist.send"
_SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGoneError(PeftDistError):
    """The client closed its connection before the answer was complete."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled at once when the client goes away.

    Raises:
        ClientGoneError: the client went first.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError("the client closed the connection")
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: bytes) -> bytes:
    """One line of data as a server-sent event."""
    return b"data: " + data + b"\n\n"


class DirectSendMiddleware:
    """Keeps how the server sends, for answers of many parts; the outermost one.

    What stands in between looks only at how an answer begins, and would be asked for every token.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[_SEND] = send
        await self._app(scope, receive, send)


class EventStream(Response):
    """Sends events as they come, one or several at once, and ``[DONE]`` at the end; an error in between is an event of
    its own. ``close`` runs in any case at the end."""

    media_type = "text/event-stream"

    def __init__(
        self,
        tell: Callable[[SendEvents], Awaitable[None]],
        close: Callable[[], Awaitable[None]],
        headers: Mapping[str, str],
    ) -> None:
        """``tell``: Sends what there is to tell, to its end."""
        self.status_code = 200
        self.background = None
        self.init_headers({**_SSE_HEADERS, **headers})
        self._tell = tell
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send, scope.get(_SEND, send)))
        except ClientGoneError:
            pass  # Nobody is left to tell.
        finally:
            await self._close()

    async def _send_all(self, send: Send, send_part: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await self._tell(lambda events: send_part(_part(events)))
        except Exception as error:  # The status is sent already: only an event can tell the client what happened.
            if not isinstance(error, PeftDistError):
                logger.exception("a stream failed")
            await send_part(_part(event(encode_json(as_api_error(error).body()))))
        await send_part(_part(event(b"[DONE]")))
        await send_part({"type": "http.response.body", "body": b"", "more_body": False})


def _part(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": True}
