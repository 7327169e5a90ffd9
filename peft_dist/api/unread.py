"""Clients that do not read what they asked for: their connections are cut, so that nothing is kept for them."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import struct
import sys
import termios
from collections.abc import Collection
from typing import Any, NamedTuple

from peft_dist.core.errors import ConfigError

logger = logging.getLogger(__name__)
_LOOKS = 8
_MOST_SECONDS_BETWEEN_LOOKS = 2.0
MAX_UNSENT_BYTES = 256 << 20
# What the system keeps for a connection is bounded as well, and a client that reads nothing is noticed sooner. Linux
# doubles it; on a line with a delay of 100 ms a connection still carries over a megabyte a second.
SEND_BUFFER_BYTES = 128 << 10
# Reset at once, with what the system still has for it.
_NO_LINGER = struct.pack("ii", 1, 0)


class _Unsent(NamedTuple):
    num_bytes: int
    since: float


class UnreadWatch:
    """Cuts connections whose unsent bytes have been the same for too long: their clients read nothing, or are gone.

    Whoever writes to such a connection waits, so its bytes do not grow either. Cutting it is a disconnect like any
    other: the request is aborted, and its tokens are dropped.

    Attributes:
        num_cut: Connections that were cut so far.
        num_bytes: Of answers, handed over by this process and not taken by the system, when it was looked last.
    """

    def __init__(self, seconds: float, max_bytes: int = MAX_UNSENT_BYTES) -> None:
        """
        Args:
            seconds: For which a client may read nothing.
            max_bytes: Unsent ones of all connections; beyond it those are cut first that have not moved for longest,
                though their time is not over.

        Raises:
            ConfigError: ``seconds`` is not above 0.
        """
        if not seconds > 0:
            raise ConfigError(f"unread_timeout={seconds} must be seconds above 0")
        self.num_cut = 0
        self.num_bytes = 0
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._unsent: dict[Any, _Unsent] = {}

    async def run(self, connections: Collection[Any]) -> None:
        """Look at the connections again and again, for ever.

        ``connections``: uvicorn's, of any of its HTTP implementations; each is among them until it is lost.
        """
        now = asyncio.get_running_loop().time
        while True:
            self.look(connections, now())
            await asyncio.sleep(min(self._seconds / _LOOKS, _MOST_SECONDS_BETWEEN_LOOKS))

    def look(self, connections: Collection[Any], now: float) -> None:
        """Cut those whose time is over. ``now``: Seconds of a clock that never runs backwards."""
        found: dict[Any, _Unsent] = {}
        for connection in connections:
            if num_bytes := _unsent_bytes(connection.transport):
                before = self._unsent.get(connection)
                is_same = before is not None and before.num_bytes == num_bytes
                found[connection] = before if is_same and before is not None else _Unsent(num_bytes, now)
        self.num_bytes = sum(unsent.num_bytes for unsent in found.values())
        for connection, unsent in sorted(found.items(), key=lambda item: item[1].since):
            is_full = self.num_bytes > self._max_bytes and unsent.since < now
            if is_full or now - unsent.since >= self._seconds:
                del found[connection]
                self._cut(connection, unsent, now)
        self._unsent = found

    def _cut(self, connection: Any, unsent: _Unsent, now: float) -> None:
        self.num_cut += 1
        self.num_bytes -= unsent.num_bytes
        where = connection.client[0] if connection.client else "unknown address"
        logger.warning(
            "a client (%s) has read nothing for %.0f s, with %d bytes before it: its connection is cut",
            where,
            now - unsent.since,
            unsent.num_bytes,
        )
        transport = connection.transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        transport.abort()


def _unsent_bytes(transport: Any) -> int:
    unsent: int = transport.get_write_buffer_size()
    if transport.get_extra_info("sslcontext") is None:
        return unsent
    # What the connection beneath has taken is not counted there: up to 64 KiB, which may be the whole of an answer.
    queued = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    return unsent + int.from_bytes(queued, sys.byteorder)
