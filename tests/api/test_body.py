"""Bodies under way: they may not stand still, nor take any amount of memory before their requests are admitted."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from peft_dist.api.body import BodyMiddleware, release
from peft_dist.api.options import ServerOptions
from tests.api.http_support import BODIES, COMPLETIONS, ScriptedClient, error_of, serving


class App:
    """Reads the body, then waits; what it has read is told by ``has_read``."""

    def __init__(self) -> None:
        self.has_read = asyncio.Event()
        self.may_admit = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.admitted = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        self.has_read.set()
        await self.may_admit.wait()
        release(scope)
        self.admitted.set()
        await self.may_answer.wait()


def scope() -> Scope:
    return {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"content-type", b"application/json")],
    }


async def never(message: Message) -> None:
    raise AssertionError(message)


def parts(sizes: Sequence[int]) -> Receive:
    """A client that sends parts of such sizes, then nothing."""
    left = list(sizes)

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()
        size = left.pop(0)
        return {"type": "http.request", "body": bytes(size), "more_body": True}

    return receive


def whole(size: int) -> Receive:
    async def receive() -> Message:
        return {"type": "http.request", "body": bytes(size), "more_body": False}

    return receive


@asynccontextmanager
async def reading(middleware: BodyMiddleware, receive: Receive) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(middleware(scope(), receive, never))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def refusal(middleware: BodyMiddleware, receive: Receive) -> HTTPException:
    with pytest.raises(HTTPException) as refused:
        await middleware(scope(), receive, never)
    return refused.value


def test_one_that_stands_still_is_given_up() -> None:
    async def work() -> None:
        middleware = BodyMiddleware(App(), 100, 0.01)
        error = await refusal(middleware, parts([10, 10]))
        assert error.status_code == 408 and "0.01 seconds" in error.detail and middleware.num_held == 0

    asyncio.run(work())


def test_whoever_has_sent_all_may_wait_for_the_answer() -> None:
    """An application listens for the end of its client as long as it answers."""

    async def answering(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == bytes(10)
        assert (await receive())["type"] == "http.disconnect"

    async def work() -> None:
        first = True

        async def receive() -> Message:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": bytes(10)}
            # Any wait is longer than the time that a body has here.
            for _ in range(3):
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        await BodyMiddleware(answering, 100, 0.0)(scope(), receive, never)

    asyncio.run(work())


def test_together_they_have_a_bound_until_they_are_admitted() -> None:
    async def work() -> None:
        app = App()
        middleware = BodyMiddleware(app, 100, 60.0, max_held=150)
        async with reading(middleware, whole(100)) as first:
            await app.has_read.wait()
            assert middleware.num_held == 100
            error = await refusal(middleware, whole(60))
            assert error.status_code == 429 and (error.headers or {})["Retry-After"] == "1"
            # Whoever is refused holds nothing, and others are taken while there is room.
            assert middleware.num_held == 100
            app.has_read.clear()
            async with reading(middleware, whole(50)) as second:
                await app.has_read.wait()
                assert middleware.num_held == 150
                app.may_admit.set()
                await app.admitted.wait()
                app.may_answer.set()
                await second
            await first
            assert middleware.num_held == 0

    asyncio.run(work())


def test_an_admitted_one_does_not_count_while_it_is_answered() -> None:
    async def work() -> None:
        app = App()
        app.may_admit.set()
        middleware = BodyMiddleware(app, 100, 60.0, max_held=100)
        async with reading(middleware, whole(100)) as first:
            await app.admitted.wait()
            assert middleware.num_held == 0 and not first.done()

    asyncio.run(work())


def test_what_is_kept_until_the_answer_has_a_bound_too() -> None:
    async def work() -> None:
        app = App()
        app.may_admit.set()
        middleware = BodyMiddleware(app, 100, 60.0, max_kept=150)
        async with reading(middleware, whole(100)) as first:
            await app.admitted.wait()
            assert (middleware.num_held, middleware.num_kept) == (0, 100)
            error = await refusal(middleware, whole(60))
            assert error.status_code == 429 and "not answered yet have more than 150 bytes" in error.detail
            assert (middleware.num_held, middleware.num_kept) == (0, 100)
            app.may_answer.set()
            await first
            assert middleware.num_kept == 0

    asyncio.run(work())


def test_clients_are_told_and_others_go_on() -> None:
    with serving(ScriptedClient(), ServerOptions(unread_timeout=2.0)) as address:
        url = httpx.URL(address)
        with socket.create_connection((url.host, url.port or 80), timeout=60) as connection:
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99"
            connection.sendall(head.encode() + b"\r\n\r\n{")
            text = b""
            while part := connection.recv(1 << 12):
                text += part
        headers, _, body = text.partition(b"\r\n\r\n")
        error = error_of(httpx.Response(int(headers.split()[1]), json=json.loads(body)), 408)
        assert error["code"] == "request_timeout" and "2 seconds" in error["message"]
        assert httpx.post(f"{address}{COMPLETIONS}", json=BODIES[COMPLETIONS], timeout=60).status_code == 200
