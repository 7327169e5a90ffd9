"""Every answer has an id in ``X-Request-Id``, errors too: the client's own where it sent one."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-Id"
_KEY = "peft_dist.request_id"
# What stands in a line of a log as it is.
_GOOD = re.compile(r"[!-~]{1,128}")


def given_id(scope: Scope) -> str | None:
    """What the client calls its request; None: it gave no name, or none that can be written as it is."""
    name = Headers(scope=scope).get(HEADER, "")
    return name if _GOOD.fullmatch(name) else None


def id_of(scope: Scope) -> str:
    """Of a request that the middleware has seen."""
    name: str = scope[_KEY]
    return name


class RequestIdMiddleware:
    """Names requests, and says the name in the header of whatever answers them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = given_id(scope)
        scope[_KEY] = given or f"req-{uuid.uuid4().hex}"

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message["headers"]))
                # The id of an answer is its request's name, where the client gave none.
                if given is not None or HEADER not in headers:
                    headers[HEADER] = scope[_KEY]
                message = {**message, "headers": headers.raw}
            await send(message)

        await self._app(scope, receive, named)
