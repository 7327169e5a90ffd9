"""Ports for servers that have to be told one before they listen."""

from __future__ import annotations

import contextlib
import secrets
import socket
from pathlib import Path

NUM_PORTS = 8000


def free_ports(number: int) -> list[int]:
    """Different ports of this host that nobody listens on.

    Below those that the system hands out by itself: one of these could be any other process's by the time it is used,
    and whoever connects to it again and again while nobody listens may be handed it himself.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]) - NUM_PORTS
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < number:
            # Not from ``random``, whose state hypothesis sets: processes that test side by side would draw the same.
            port = first + secrets.randbelow(NUM_PORTS)
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):  # somebody's
                probe.bind(("127.0.0.1", port))
                found.append(port)
    return found


def free_address() -> str:
    """As ``free_ports``, for zmq."""
    return f"tcp://127.0.0.1:{free_ports(1)[0]}"
