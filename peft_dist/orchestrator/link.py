"""The orchestrator's end of the socket to its replicas."""

from __future__ import annotations

import shutil
import tempfile

import zmq.asyncio
from zmq.constants import SocketOption, SocketType

from peft_dist.core.messages import encode_command
from peft_dist.orchestrator.records import Outgoing


class Link:
    """A ROUTER socket to which each incarnation of a replica connects as ``b"<replica_id>.<epoch>"``.

    Side sockets, which are only heard, add a name to that.

    It lies in a folder that only this user can enter, so whoever connects needs no further authentication.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="peft-dist-")
        self.endpoint = f"ipc://{self._folder}/orchestrator"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(SocketType.ROUTER)
        # Without high-water marks sending never waits; the Orchestrator bounds what can be under way.
        self._socket.set(SocketOption.SNDHWM, 0)
        self._socket.set(SocketOption.RCVHWM, 0)
        self._socket.set(SocketOption.LINGER, 0)
        self._socket.bind(self.endpoint)

    def send(self, out: Outgoing) -> None:
        """Hand over a command; it is dropped when its incarnation of the replica is not connected."""
        identity = f"{out.replica_id}.{out.epoch}".encode()
        self._socket.send_multipart([identity, encode_command(out.command, out.epoch)])

    async def receive(self) -> tuple[int, int, bytes]:
        """Replica id, epoch and encoded report of the next message."""
        identity, data = await self._socket.recv_multipart()
        replica_id, epoch, *_ = identity.split(b".")
        return int(replica_id), int(epoch), data

    def close(self) -> None:
        """Close the socket and remove its folder."""
        self._socket.close()
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)
