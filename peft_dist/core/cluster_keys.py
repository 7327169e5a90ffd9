"""Keys of a cluster: who may connect to an orchestrator from another machine, and to whom a replica speaks."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from peft_dist.core.errors import ConfigError

_HOW = "make one with `peft-dist keys FILE`, and bring the same file to every machine"


class ClusterKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """CURVE keys (Z85, 40 characters each) of the orchestrator and of all replicas that join it."""

    server_public: str
    server_secret: str
    worker_public: str
    worker_secret: str

    @classmethod
    def make(cls) -> ClusterKeys:
        """New ones, from the system's randomness."""
        (server_public, server_secret), (worker_public, worker_secret) = zmq.curve_keypair(), zmq.curve_keypair()
        return cls(*(key.decode() for key in (server_public, server_secret, worker_public, worker_secret)))

    def write(self, path: Path) -> None:
        """Write them where only this user can read them.

        Raises:
            ConfigError: there is such a file already, or it cannot be written.
        """
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(self)) + b"\n")
        except FileExistsError:
            raise ConfigError(f"{path} exists: keys are never overwritten, name another file") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}") from error

    @classmethod
    def read(cls, path: Path) -> ClusterKeys:
        """Raises ConfigError when the file holds no keys."""
        try:
            keys = msgspec.json.decode(path.read_bytes(), type=cls)
            pairs = (keys.server_secret, keys.server_public), (keys.worker_secret, keys.worker_public)
            for secret, public in pairs:
                if zmq.curve_public(secret.encode()) != public.encode():
                    raise ConfigError(f"{path}: a public key does not belong to its secret one: {_HOW}")
        except (OSError, msgspec.MsgspecError, ValueError, zmq.ZMQError) as error:
            raise ConfigError(f"{path} holds no keys of a cluster ({error}): {_HOW}") from error
        return keys

    def serve(self, socket: zmq.SyncSocket | zmq.asyncio.Socket) -> None:
        """Let a socket take connections of whoever knows the server's key; before it is bound."""
        socket.set(zmq.SocketOption.CURVE_SERVER, 1)
        socket.set(zmq.SocketOption.CURVE_SECRETKEY, self.server_secret.encode())

    def connect(self, socket: zmq.SyncSocket | zmq.asyncio.Socket) -> None:
        """Let a socket connect as a replica, and to this orchestrator only; before it is connected."""
        socket.set(zmq.SocketOption.CURVE_SERVERKEY, self.server_public.encode())
        socket.set(zmq.SocketOption.CURVE_PUBLICKEY, self.worker_public.encode())
        socket.set(zmq.SocketOption.CURVE_SECRETKEY, self.worker_secret.encode())
