"""What ``peft-dist worker --join`` says before anybody answers."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import cast

import pytest
import zmq.asyncio

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.core.joining import Leave, Welcome
from peft_dist.core.messages import decode_report, encode_command
from peft_dist.worker import joining
from peft_dist.worker.joining import JoinSettings, join


@pytest.mark.parametrize(
    "address", ["server", "server:5600", "tcp://server", "tcp://server:56x", "tcp://server:99999", "http://server:5600"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"--join.*no address.*tcp://server:5600"):
        asyncio.run(join(JoinSettings(address, None, {}), asyncio.Event()))


def test_an_address_that_cannot_be_used_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--join 'tcp://\*:5600' cannot be used"):
        asyncio.run(join(JoinSettings("tcp://*:5600", None, {}), asyncio.Event()))


class _Waiting(logging.Handler):
    def __init__(self, heard: asyncio.Event) -> None:
        super().__init__()
        self._heard = heard
        self.words = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            self.words = record.getMessage()
            self._heard.set()


def test_whoever_waits_for_a_server_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_TELL_SECONDS", (0.01, 60.0))

    async def waiting(address: str) -> str:
        stop = asyncio.Event()
        handler = _Waiting(stop)
        joining.logger.addHandler(handler)
        try:
            # The first warning is what ends it.
            assert await join(JoinSettings(address, None, {}), stop) == 0
        finally:
            joining.logger.removeHandler(handler)
        return handler.words

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{nobody.getsockname()[1]}"
        words = asyncio.run(waiting(address))
    assert address in words and "--listen" in words and "--cluster-key" in words


class _LosesItsConnection:
    """A socket that says it can send, and whose connection has gone when it does; the next time it is there."""

    def __init__(self) -> None:
        self._has_failed = False
        self.said: asyncio.Queue[object] = asyncio.Queue()

    async def send(self, data: bytes) -> None:
        if not self._has_failed:
            self._has_failed = True
            raise zmq.Again
        await self.said.put(decode_report(data).message)

    async def recv(self) -> bytes:
        await self.said.get()
        welcome = Welcome(
            attempt=2,
            replica_id=1,
            incarnation=7,
            engine=EngineConfig("m"),
            replica_factory="nowhere:nothing",
            heartbeat_seconds=1.0,
        )
        return encode_command(welcome, 0)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> _LosesItsConnection:
    monkeypatch.setattr(joining, "_ASK_SECONDS", 0.01)
    return _LosesItsConnection()


def test_whoever_asks_to_join_asks_again_where_the_connection_goes_meanwhile(link: _LosesItsConnection) -> None:
    """It ended with zmq's "Resource temporarily unavailable", after minutes of waiting for a server."""
    door = joining._Door(cast(zmq.asyncio.Socket, link), "name")
    welcome = asyncio.run(asyncio.wait_for(door.ask(2), 60.0))
    assert welcome.replica_id == 1


def test_whoever_leaves_says_so_again_where_the_connection_goes_meanwhile(link: _LosesItsConnection) -> None:
    door = joining._Door(cast(zmq.asyncio.Socket, link), "name")

    async def leaving() -> object:
        task = asyncio.ensure_future(door.leave(2))
        hears = asyncio.ensure_future(link.said.get())
        await asyncio.wait({task, hears}, timeout=60.0, return_when=asyncio.FIRST_COMPLETED)
        task.cancel()
        return hears.result()

    assert asyncio.run(leaving()) == Leave(attempt=2)
