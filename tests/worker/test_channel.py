"""The replica's end of its socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from peft_dist.core.messages import AnyCommand, Fatal, Fence, Heartbeat, Ping, Shutdown, decode_report, encode_command
from peft_dist.core.numbering import Outbox
from peft_dist.worker.channel import Channel

EPOCH, LONG_MS = 1, 20_000


class Server:
    """The other end, which has heard the replica's last words."""

    def __init__(self, folder: Path) -> None:
        self.context = zmq.Context()
        self._socket = self.context.socket(zmq.SocketType.ROUTER)
        self._socket.bind(f"ipc://{folder}/server")
        self.channel = Channel(f"ipc://{folder}/server", 0, EPOCH)
        self._outbox = Outbox()
        self.channel.send(Fatal(error="it cannot go on"))
        assert self._socket.poll(LONG_MS)
        self._name = self._socket.recv_multipart()[0]

    def say(self, *commands: AnyCommand) -> None:
        for command in commands:
            self.say_bytes(encode_command(command, EPOCH, self._outbox.next()))

    def say_bytes(self, data: bytes) -> None:
        self._socket.send_multipart([self._name, data])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.channel.close()
    made.context.destroy(linger=0)


@pytest.mark.parametrize("end", [Shutdown(), Fence()])
def test_the_farewell_may_come_behind_others(server: Server, end: AnyCommand) -> None:
    server.say(Ping(), Ping(), end)
    assert server.channel.await_farewell(LONG_MS)


def test_what_was_said_before_is_no_farewell(server: Server) -> None:
    """A server that says Ping all the time while a model is loaded has not heard why that failed."""
    server.say(Ping(), Ping())
    assert not server.channel.await_farewell(50)


def test_a_server_of_another_version_says_none(server: Server) -> None:
    server.say_bytes(b"no message of ours")
    assert not server.channel.await_farewell(LONG_MS)


def test_signs_of_life_that_nobody_hears_do_not_pile_up(tmp_path: Path) -> None:
    """A server may be stopped for days."""
    endpoint = f"ipc://{tmp_path}/server"
    channel = Channel(endpoint, 0, EPOCH)
    sender, last = channel.sender(), -1.0
    for number in range(10_000):
        sender.send(Heartbeat(busy_seconds=float(number)))
    context = zmq.Context()
    socket = context.socket(zmq.SocketType.ROUTER)
    try:
        socket.bind(endpoint)
        heard: list[float] = []
        while last not in heard:
            sender.send(Heartbeat(busy_seconds=last))
            while socket.poll(20):
                message = decode_report(socket.recv_multipart()[1]).message
                assert isinstance(message, Heartbeat)
                heard.append(message.busy_seconds)
        assert 0 < len([number for number in heard if number != last]) < 100
    finally:
        sender.close()
        channel.close()
        context.destroy(linger=0)
