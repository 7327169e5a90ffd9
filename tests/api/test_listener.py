"""Connections that stay open between requests."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from peft_dist.api.listener import Listener
from peft_dist.api.unread import UnreadWatch


async def answer(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


def test_an_idle_connection_is_the_clients_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that asked again after 5 s found its connection closed while the request was on its way."""

    async def main() -> list[float]:
        listener = Listener("127.0.0.1", 0)
        ended = await listener.start(answer, 1.0, UnreadWatch(60.0))
        loop, delays = asyncio.get_running_loop(), []
        later = loop.call_later

        def noted(delay: float, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:
            delays.append(delay)
            return later(delay, *args, **kwargs)

        monkeypatch.setattr(loop, "call_later", noted)
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        writer.close()
        listener.finish()
        await ended
        return delays

    delays = asyncio.run(main())
    # What the client of our tests, and of OpenAI, keeps; and proxies, a minute.
    assert httpx.Limits().keepalive_expiry == 5 and max(delays) > 60
