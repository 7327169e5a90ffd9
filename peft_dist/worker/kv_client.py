"""Another host's exported KV, read over TCP: chunks that are asked for one after another."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

import torch
import zmq

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.runner.shared_memory import MemoryGoneError

CHUNK_BYTES = 1 << 20
# First byte and length, of a chunk.
REQUEST = struct.Struct("<QQ")
SILENCE_MS = 5000
# Asked for before the first of them has come, so that neither side waits for the way.
_WINDOW = 8


class NoAnswerError(MemoryGoneError):
    """Nothing came from there."""


@contextlib.contextmanager
def connected(address: str, silence_ms: int, keys: ClusterKeys | None) -> Iterator[zmq.Socket[bytes]]:
    """A DEALER to who serves KV there, on which nothing is waited for longer than ``silence_ms``."""
    with zmq.Context() as context, context.socket(zmq.SocketType.DEALER) as socket:
        socket.set(zmq.SocketOption.LINGER, 0)
        socket.set(zmq.SocketOption.RCVTIMEO, silence_ms)
        if keys is not None:
            keys.connect(socket)
        socket.connect(address)
        yield socket


def fetch(
    address: str, token: str, num_bytes: int, silence_ms: int = SILENCE_MS, keys: ClusterKeys | None = None
) -> torch.Tensor:
    """Read an export of another host: uint8 ``[num_bytes]``.

    Raises:
        MemoryGoneError: it is not there any more.
        NoAnswerError: nothing came for ``silence_ms``, which is all that one with other keys will see.
    """
    contents = torch.empty(num_bytes, dtype=torch.uint8)
    with connected(address, silence_ms, keys) as socket:
        for number, first in enumerate(range(0, num_bytes, CHUNK_BYTES)):
            if number >= _WINDOW:
                _receive(socket, contents, address)
            length = min(CHUNK_BYTES, num_bytes - first)
            socket.send_multipart([token.encode(), REQUEST.pack(first, length)])
        for _ in range(min(-(-num_bytes // CHUNK_BYTES), _WINDOW)):
            _receive(socket, contents, address)
    return contents


def _receive(socket: zmq.Socket[bytes], contents: torch.Tensor, address: str) -> None:
    try:
        request, chunk = socket.recv_multipart()
    except zmq.Again:
        raise NoAnswerError(f"{address} does not answer") from None
    first, length = REQUEST.unpack(request)
    if len(chunk) != length:
        raise MemoryGoneError(f"{address} has let it go")
    contents[first : first + length] = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
