"""What ``peft-dist worker --join`` says before anybody answers."""

from __future__ import annotations

import asyncio
import logging
import socket

import pytest

from peft_dist.core.errors import ConfigError
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
