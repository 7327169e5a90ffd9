"""Open files that go from process to process of one host."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Callable

from peft_dist.runner.shared_memory import MemoryGoneError

Offer = Callable[[bytes], int]
"""The descriptor for a kind that is asked for."""

_TOKEN_BYTES = 32
_SECONDS = 5.0
_HERE, _GONE = b"y", b"n"


class DescriptorServer:
    """Hands out open files, on a thread, to processes of this host and user that know their token.

    Its address is no file (an abstract Unix socket): nothing is left of it, however this process ends. A file that was
    handed out stays open in the other process when this one closes it, or ends.
    """

    def __init__(self) -> None:
        """Raises OSError when there are no such sockets."""
        self.address = f"peft-dist-{secrets.token_hex(16)}"
        self._offers: dict[str, Offer] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(f"\0{self.address}")
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, name="descriptors", daemon=True)
        self._thread.start()

    def offer(self, token: str, offer: Offer) -> None:
        """``token``: 32 ASCII characters. ``offer`` is called on the server's thread."""
        self._offers[token] = offer

    def withdraw(self, token: str) -> None:
        """Nothing happens where it is not offered."""
        self._offers.pop(token, None)

    def close(self) -> None:
        """Answer nobody any more."""
        if self._thread.is_alive():
            # Which ends its wait.
            self._socket.shutdown(socket.SHUT_RDWR)
            self._thread.join()
        self._socket.close()
        self._offers.clear()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(_SECONDS)
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        """Whatever a client does, the next one is served."""
        try:
            request = _receive(connection, _TOKEN_BYTES + 1)
            offer = self._offers.get(request[:_TOKEN_BYTES].decode(errors="replace"))
            if offer is None or _peer_user(connection) != os.getuid():
                connection.sendall(_GONE)
            else:
                socket.send_fds(connection, [_HERE], [offer(request[_TOKEN_BYTES:])])
        except (OSError, MemoryGoneError, RuntimeError):
            pass  # Closing the connection says it; also that there is no memory for a copy.


def fetch_descriptor(address: str, token: str, kind: bytes) -> int:
    """An open file of another process, to be closed by the caller.

    Args:
        kind: One byte, for whoever offers it.

    Raises:
        MemoryGoneError: that process has ended or has let it go, or is not on this host.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(_SECONDS)
            connection.connect(f"\0{address}")
            connection.sendall(token.encode() + kind)
            word, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    except OSError as error:
        raise MemoryGoneError(f"{address} does not answer: {error}") from error
    if word != _HERE or len(descriptors) != 1:
        raise MemoryGoneError(f"{address} has let it go")
    return descriptors[0]


def _receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        if not (part := connection.recv(length - len(data))):
            raise ConnectionResetError
        data += part
    return data


def _peer_user(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[4:8], "little")
