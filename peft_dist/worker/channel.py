"""The replica's end of the socket to the orchestrator."""

from __future__ import annotations

import contextlib
import time

import zmq

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.messages import (
    AnyCommand,
    AnyReport,
    Fence,
    ProtocolError,
    Shutdown,
    decode_command,
    encode_report,
)
from peft_dist.core.numbering import Inbox, Outbox

_LAST_WORDS_MS = 5000
_SIDE_MESSAGES = 16


class Channel:
    """Sends reports and receives commands of one incarnation of a replica. Belongs to one thread."""

    def __init__(self, endpoint: str, replica_id: int, epoch: int, keys: ClusterKeys | None = None) -> None:
        self._epoch = epoch
        self._outbox, self._inbox = Outbox(), Inbox()
        self._keys = keys
        self._context = zmq.Context()
        self._endpoint = endpoint
        self._identity = f"{replica_id}.{epoch}"
        self._socket = self._connect(self._identity)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.PollEvent.POLLIN)

    def rename(self, replica_id: int, epoch: int) -> None:
        """Be another incarnation from now on. What was sent as the one before, and has not left, never will."""
        self._poller.unregister(self._socket)
        self._socket.close(linger=0)
        self._epoch, self._identity = epoch, f"{replica_id}.{epoch}"
        self._outbox, self._inbox = Outbox(), Inbox()
        self._socket = self._connect(self._identity)
        self._poller.register(self._socket, zmq.PollEvent.POLLIN)

    def is_named(self, replica_id: int, epoch: int) -> bool:
        """Whether it is the channel of this incarnation."""
        return self._identity == f"{replica_id}.{epoch}"

    def sender(self) -> Sender:
        """Another way to the orchestrator under the same epoch, for one other thread. Close it before the channel.

        What goes that way belongs to no order, and its loss is not noticed.
        """
        return Sender(self._connect(f"{self._identity}.side", most=_SIDE_MESSAGES), self._epoch)

    def _connect(self, identity: str, most: int = 0) -> zmq.Socket[bytes]:
        """``most``: Messages that wait until the orchestrator reads them. 0: Any number, of which it sees to that they
        are few: reports are of sequences that it has sent, and a worker that hears nothing drops those."""
        socket = self._context.socket(zmq.SocketType.DEALER)
        socket.set(zmq.SocketOption.IDENTITY, identity.encode())
        socket.set(zmq.SocketOption.SNDHWM, most)
        socket.set(zmq.SocketOption.RCVHWM, 0)
        if self._keys is not None:
            self._keys.connect(socket)
        socket.connect(self._endpoint)
        return socket

    def watch(self, fd: int) -> None:
        """Let ``wait`` also return when this file descriptor is readable."""
        self._poller.register(fd, zmq.PollEvent.POLLIN)

    @property
    def missing(self) -> tuple[int, int] | None:
        """Numbers of commands, from the first to the last, that did not arrive, though later ones did."""
        return self._inbox.missing

    def send(self, report: AnyReport) -> None:
        """Send a report under this replica's epoch."""
        self._socket.send(encode_report(report, self._epoch, self._outbox.next()))

    def wait(self, timeout_ms: int | None = None) -> None:
        """Return when a command or a watched descriptor is readable, at the latest after ``timeout_ms``."""
        self._poller.poll(timeout_ms)

    def receive(self) -> list[AnyCommand]:
        """All commands that have arrived, in order, up to the first one that did not; those for another incarnation are
        left out. How this one ends is heard in any case.

        Raises:
            ProtocolError: the orchestrator speaks another version.
        """
        commands: list[AnyCommand] = []
        while True:
            try:
                data = self._socket.recv(zmq.Flag.NOBLOCK)
            except zmq.Again:
                return commands
            envelope = decode_command(data)
            if envelope.epoch == self._epoch and self._inbox.take(envelope.number):
                commands.append(envelope.message)

    def await_farewell(self, timeout_ms: int) -> bool:
        """Wait for how this incarnation ends (Shutdown or Fence), whatever comes before it; False: it did not come."""
        deadline = time.monotonic() + timeout_ms / 1000
        while self._socket.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            try:
                commands = self.receive()
            except ProtocolError:
                return False
            if any(isinstance(command, (Shutdown, Fence)) for command in commands):
                return True
        return False

    def close(self) -> None:
        """Close; what was sent gets a few seconds to leave."""
        self._context.destroy(linger=_LAST_WORDS_MS)


class Sender:
    """Sends reports and hears nothing. Belongs to the thread that uses it."""

    def __init__(self, socket: zmq.Socket[bytes], epoch: int) -> None:
        self._socket = socket
        self._epoch = epoch

    def send(self, report: AnyReport) -> None:
        """Send a report under this replica's epoch, unless many wait that nobody reads."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(encode_report(report, self._epoch), zmq.Flag.NOBLOCK)

    def close(self) -> None:
        """Close; what was sent last need not arrive."""
        self._socket.close(linger=0)
