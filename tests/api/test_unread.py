"""Clients that read nothing: when their connections are cut, and which."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import closing

import pytest

from peft_dist.api.listener import Listener
from peft_dist.api.unread import UnreadWatch
from peft_dist.core.errors import ConfigError

WHOLE = 8 << 20


class Transport:
    def __init__(self) -> None:
        self.size, self.aborted = 0, False

    def get_write_buffer_size(self) -> int:
        return self.size

    def get_extra_info(self, name: str) -> socket.socket:
        self.socket = socket.socket()
        return self.socket

    def abort(self) -> None:
        self.socket.close()
        self.aborted, self.size = True, 0


class Connection:
    """One of uvicorn's, as far as it is looked at."""

    client = ("10.0.0.7", 1234)

    def __init__(self) -> None:
        self.transport = Transport()


def test_only_those_whose_bytes_stay_the_same_for_so_long_are_cut(caplog: pytest.LogCaptureFixture) -> None:
    watch = UnreadWatch(10.0)
    stalled, slow, filling, idle = connections = [Connection() for _ in range(4)]
    for second in range(25):
        stalled.transport.size = 0 if stalled.transport.aborted else 500
        slow.transport.size = 10_000 - second
        filling.transport.size = 100 + 100 * second
        watch.look(connections, 100.0 + second)
        assert stalled.transport.aborted is (second >= 10)
    assert not any(each.transport.aborted for each in (slow, filling, idle))
    assert watch.num_cut == 1 and watch.num_bytes == slow.transport.size + filling.transport.size
    assert "(10.0.0.7) has read nothing for 10 s, with 500 bytes" in caplog.text


def test_beyond_a_number_of_bytes_those_that_stall_for_longest_are_cut_at_once() -> None:
    watch = UnreadWatch(1000.0, max_bytes=250)
    first, second, third, moving = connections = [Connection() for _ in range(4)]
    for number, connection in enumerate((first, second, third)):
        connection.transport.size = 100
        moving.transport.size = 1 + number
        watch.look(connections, float(number))
    # The third has been looked at once: nobody knows yet whether it moves.
    assert [each.transport.aborted for each in connections] == [True, False, False, False]
    second.transport.size = third.transport.size = 200
    moving.transport.size = 4
    watch.look(connections, 4.0)
    assert watch.num_bytes == 404 and watch.num_cut == 1, "all have moved"
    moving.transport.size = 5
    watch.look(connections, 5.0)
    assert watch.num_cut == 2 and watch.num_bytes == 205 and not moving.transport.aborted


def test_a_limit_of_no_seconds_is_refused() -> None:
    with pytest.raises(ConfigError, match="unread_timeout=0"):
        UnreadWatch(0)


async def answer(scope: object, receive: Callable[[], Awaitable[object]], send: Callable[..., Awaitable[None]]) -> None:
    """The whole answer at once, as one that is not streamed is sent."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % WHOLE)]})
    await send({"type": "http.response.body", "body": bytes(WHOLE)})


def test_whole_answers_that_are_not_read_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """Over real sockets: the handler has ended, the server would close the connection, and its bytes stay."""

    async def work() -> None:
        listener, watch = Listener("127.0.0.1", 0), UnreadWatch(1.5)
        await listener.start(answer, 1.0, watch)
        with closing(socket.create_connection(("127.0.0.1", listener.port))) as stalled:
            stalled.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port, limit=1 << 16)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            size = 0
            while not watch.num_cut:
                # Slowly, but it does.
                size += len(await reader.read(1 << 13))
                await asyncio.sleep(0.01)
            assert watch.num_bytes < WHOLE, "what the slow one has before it is left"
            while size < WHOLE:
                size += len(await reader.read(1 << 20))
            assert watch.num_cut == 1
            writer.close()
            stalled.settimeout(10)
            # It gets what the system had, and then a reset.
            with pytest.raises(ConnectionResetError):
                while stalled.recv(1 << 20):
                    pass
        await listener.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(asyncio.wait_for(work(), 60))
    assert "its connection is cut" in caplog.text
