"""How a stream of events is sent: its parts past what looks at the beginnings of answers alone."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from peft_dist.api.streaming import DirectSendMiddleware, EventStream, SendEvents
from peft_dist.core.errors import EngineDeadError


async def tell(error: Exception | None, send: SendEvents) -> None:
    await send(b"data: 1\n\n")
    await send(b"data: 2\n\ndata: 3\n\n")
    if error is not None:
        raise error


async def stays() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


def served(*, is_direct: bool, error: Exception | None = None) -> tuple[list[Message], list[str], int]:
    """What the server is given, what went by the middle, and how often the stream was closed."""
    sent: list[Message] = []
    passed: list[str] = []
    closed: list[bool] = []

    async def close() -> None:
        closed.append(True)

    async def middle(scope: Scope, receive: Receive, send: Send) -> None:
        async def noting(message: Message) -> None:
            passed.append(message["type"])
            await send(message)

        await EventStream(partial(tell, error), close, {"X": "y"})(scope, receive, noting)

    async def to_server(message: Message) -> None:
        sent.append(message)

    app: Any = DirectSendMiddleware(middle) if is_direct else middle
    asyncio.run(app({"type": "http"}, stays, to_server))
    return sent, passed, len(closed)


@pytest.mark.parametrize("is_direct", [True, False])
def test_parts_go_past_the_middle_in_order(is_direct: bool) -> None:
    sent, passed, num_closed = served(is_direct=is_direct)
    assert sent[0]["status"] == 200 and (b"x", b"y") in sent[0]["headers"]
    bodies = [message["body"] for message in sent[1:]]
    assert bodies == [b"data: 1\n\n", b"data: 2\n\ndata: 3\n\n", b"data: [DONE]\n\n", b""]
    assert [message["more_body"] for message in sent[1:]] == [True, True, True, False]
    assert passed == ["http.response.start"] + ["http.response.body"] * (0 if is_direct else 4)
    assert num_closed == 1


def test_an_error_is_an_event_before_the_end() -> None:
    sent, _, num_closed = served(is_direct=True, error=EngineDeadError("the replica is gone"))
    *_, problem, done, end = [message["body"] for message in sent[1:]]
    assert b"the replica is gone" in problem and problem.startswith(b"data: {") and done == b"data: [DONE]\n\n"
    assert end == b"" and num_closed == 1
