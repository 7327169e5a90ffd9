"""The orchestrator's ends of the sockets to its replicas."""

from __future__ import annotations

import asyncio
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.constants import SocketOption, SocketType

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.errors import ConfigError
from peft_dist.core.joining import host_of_address
from peft_dist.core.messages import AnyCommand, Fence, Ping, Shutdown, encode_command
from peft_dist.core.numbering import UNNUMBERED, Outbox
from peft_dist.orchestrator.records import Outgoing, Replica

# What an epoch takes in a message.
_MOST = 1 << 63
_PING_SECONDS = 0.5
_LOOPBACK = ("127.", "[::1]", "localhost")


class Received(NamedTuple):
    """A message as it came.

    Attributes:
        sender: The socket that it came from.
        replica_id, epoch: Of the incarnation that the sender says it is; None of one that has not been given any.
        data: The encoded report.
    """

    sender: bytes
    replica_id: int | None
    epoch: int
    data: bytes

    @property
    def listener(self) -> bytes:
        """The socket of the same incarnation that listens."""
        return f"{self.replica_id}.{self.epoch}".encode()


class Link:
    """A ROUTER socket to which each incarnation of a replica connects as ``b"<replica_id>.<epoch>"``.

    Side sockets, which are only heard, add a name to that. Whoever wants to join connects as ``b"join.<any name>"``.

    Args:
        context: Closed with the socket.
        close: Called behind that.
    """

    def __init__(self, socket: zmq.asyncio.Socket, context: zmq.asyncio.Context, close: Callable[[], None]) -> None:
        self._socket, self._context, self._close = socket, context, close
        # By replica, its last incarnation and what that was sent.
        self._outboxes: dict[int, tuple[int, Outbox]] = {}
        endpoint = socket.get(SocketOption.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        self.endpoint = endpoint.decode().rstrip("\0")

    @classmethod
    def local(cls, path: Path | None = None) -> Link:
        """In a folder that only this user can enter, so whoever connects needs no further authentication.

        ``path``: Of the socket, in such a folder that is kept; another process may have left it there.
        """
        context, socket = _router()
        if path is not None:
            socket.bind(f"ipc://{path}")
            return cls(socket, context, lambda: path.unlink(missing_ok=True))
        folder = tempfile.mkdtemp(prefix="peft-dist-")
        socket.bind(f"ipc://{folder}/orchestrator")
        return cls(socket, context, lambda: shutil.rmtree(folder, ignore_errors=True))

    @classmethod
    def listening(cls, address: str, keys: ClusterKeys | None) -> Link:
        """For replicas of other machines, with keys; without them, only for those of this one.

        Args:
            address: ``tcp://host:port``; port 0 is any free one.

        Raises:
            ConfigError: the address cannot be used, or would let anybody in.
        """
        host = host_of_address(address, "listen=", "tcp://127.0.0.1:5600")
        if keys is None and not host.startswith(_LOOPBACK):
            raise ConfigError(
                f"listen={address!r} can be reached from other machines, and whoever reaches it gets every request: "
                "give --cluster-key (peft-dist keys FILE makes one), or listen on 127.0.0.1"
            )
        context, socket = _router()
        guard = None if keys is None else _guarded(context, socket, keys)
        try:
            socket.bind(address.replace("localhost", "127.0.0.1"))
        except zmq.ZMQError as error:
            if guard is not None:
                guard.stop()
            context.destroy(linger=0)
            raise ConfigError(f"listen={address!r} cannot be used: {error}") from error
        return cls(socket, context, guard.stop if guard is not None else lambda: None)

    def send(self, out: Outgoing) -> None:
        """Hand over a command; it is dropped when its incarnation of the replica is not connected.

        A later one shows that it was, but to one that is over or is told to be: that needs to know of none before.
        """
        receiver = f"{out.replica_id}.{out.epoch}".encode()
        if isinstance(out.command, Shutdown | Fence):
            self.answer(receiver, out.command, out.epoch)
            return
        epoch, outbox = self._outboxes.get(out.replica_id, (0, None))
        if outbox is None or epoch < out.epoch:
            outbox = Outbox()
            self._outboxes[out.replica_id] = out.epoch, outbox
        number = outbox.next() if epoch <= out.epoch else UNNUMBERED
        self._socket.send_multipart([receiver, encode_command(out.command, out.epoch, number)])

    def answer(self, receiver: bytes, command: AnyCommand, epoch: int = 0) -> None:
        """Hand over a command to the socket of this name. Its loss is not noticed."""
        self._socket.send_multipart([receiver, encode_command(command, epoch)])

    def ping(self, replica: Replica) -> None:
        """Let a replica hear that this process lives, and notice what it has missed."""
        if replica.ready_since is None:
            # It may not be connected yet, and nothing was said to it.
            self.answer(f"{replica.replica_id}.{replica.epoch}".encode(), Ping(), replica.epoch)
        else:
            self.send(Outgoing(replica.replica_id, replica.epoch, Ping()))

    async def keep_pinging(self, alive: Callable[[], list[Replica]]) -> None:
        """Ping those that are started by this process, for ever; not one that says nothing itself."""
        heard: dict[int, float] = {}
        while True:
            ours = [replica for replica in alive() if not replica.is_guest]
            for replica in ours:
                if replica.last_heard > heard.get(replica.epoch, -math.inf):
                    self.ping(replica)
            heard = {replica.epoch: replica.last_heard for replica in ours}
            await asyncio.sleep(_PING_SECONDS)

    @property
    def can_lose(self) -> bool:
        """Whether a connection may be lost while both its ends live, and with it what was said."""
        return self.endpoint.startswith("tcp:")

    async def receive(self) -> Received:
        """The next message. Those of senders without such a name are left out: of strangers, and of connections whose
        name another one has taken over."""
        while True:
            sender, *parts = await self._socket.recv_multipart()
            first, *rest = sender.split(b".")
            if len(parts) != 1 or not rest:
                continue
            if first == b"join":
                return Received(sender, None, 0, parts[0])
            if first.isdigit() and rest[0].isdigit() and max(int(first), int(rest[0])) < _MOST:
                return Received(sender, int(first), int(rest[0]), parts[0])

    def close(self) -> None:
        """Close the socket, and remove what was made for it."""
        self._socket.close()
        self._close()
        self._context.term()


def _router() -> tuple[zmq.asyncio.Context, zmq.asyncio.Socket]:
    context = zmq.asyncio.Context()
    socket = context.socket(SocketType.ROUTER)
    # Without high-water marks sending never waits; the Orchestrator bounds what can be under way (``Room``).
    socket.set(SocketOption.SNDHWM, 0)
    socket.set(SocketOption.RCVHWM, 0)
    socket.set(SocketOption.LINGER, 0)
    # Who comes back under its name, on a new connection, has lost the old one.
    socket.set(SocketOption.ROUTER_HANDOVER, 1)
    return context, socket


class _OneKey:
    """Lets the holders of one key in."""

    def __init__(self, public: str) -> None:
        self._public = public.encode()

    def callback(self, domain: str, key: bytes) -> bool:
        """Asked for each connection, with the key that it showed to own."""
        return key == self._public


def _guarded(context: zmq.asyncio.Context, socket: zmq.asyncio.Socket, keys: ClusterKeys) -> AsyncioAuthenticator:
    guard = AsyncioAuthenticator(context)
    guard.start()
    guard.configure_curve_callback(domain="*", credentials_provider=_OneKey(keys.worker_public))
    keys.serve(socket)
    return guard
