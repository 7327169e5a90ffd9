"""The clients of bench_capacity.py: one process, one epoll loop, one connection for each stream.

    python scripts/bench/capacity_client.py CALLS.json RECEIVED.msgpack

Cheap enough to be no bottleneck: of most streams it counts bytes and events; the bytes of some are kept.
"""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import sys
import time
from array import array
from pathlib import Path
from typing import Any

import msgspec

_TICK = os.sysconf("SC_CLK_TCK")


class Calls(msgspec.Struct, frozen=True):
    """Requests to send: (path, body) of each stream. ``keeps``: Numbers of those whose bytes are wanted.

    ``server_pid``: Whose processor time is looked at. ``timeout``: Seconds without any byte until it gives up.
    """

    port: int
    server_pid: int
    requests: list[tuple[str, dict[str, Any]]]
    keeps: list[int]
    timeout: float = 60.0


class Reading(msgspec.Struct):
    """One stream. ``times[i]``: When a read returned after which ``counts[i]`` events were there (monotonic clock).

    ``data``: All of its bytes, HTTP's included, or nothing when they were not kept.
    """

    times: list[float]
    counts: list[int]
    num_bytes: int
    data: bytes = b""


class Received(msgspec.Struct):
    """All streams; processor seconds are those between the first token and the last."""

    streams: list[Reading]
    server_cpu_seconds: float
    client_cpu_seconds: float


class _Stream:
    """A connection that counts events; one may be cut anywhere, even between its two line ends."""

    def __init__(self, port: int, path: str, body: dict[str, Any], keeps: bool) -> None:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self.socket.setblocking(False)
        self.times, self.counts = array("d"), array("q")
        self.kept: list[bytes] | None = [] if keeps else None
        self.num_bytes = self._count = 0
        self._last = b""

    def read(self) -> bool:
        """Take what is there; False at the end."""
        data = self.socket.recv(1 << 18)
        self.num_bytes += len(data)
        if self.kept is not None:
            self.kept.append(data)
        # After an event come HTTP's line ends, which begin otherwise, or the next event: never a third line feed.
        found = data.count(b"\n\n") + (self._last == b"\n" and data[:1] == b"\n")
        if found:
            self._count += found
            self.times.append(time.monotonic())
            self.counts.append(self._count)
        self._last = data[-1:]
        return bool(data)

    def reading(self) -> Reading:
        return Reading(self.times.tolist(), self.counts.tolist(), self.num_bytes, b"".join(self.kept or ()))


def receive(calls: Calls) -> Received:
    """Raises TimeoutError when nothing more comes."""
    keeps = set(calls.keeps)
    streams = [_Stream(calls.port, *request, i in keeps) for i, request in enumerate(calls.requests)]
    by_fd = {stream.socket.fileno(): stream for stream in streams}
    poll = select.epoll()
    for fd in by_fd:
        poll.register(fd, select.EPOLLIN)
    begin: tuple[float, float] | None = None
    open_streams = len(streams)
    while open_streams:
        ready = poll.poll(calls.timeout)
        if not ready:
            raise TimeoutError(f"{open_streams} streams have been silent for {calls.timeout:g} s")
        for fd, _ in ready:
            if not by_fd[fd].read():
                poll.unregister(fd)
                open_streams -= 1
        if begin is None and all(stream.num_bytes for stream in streams):
            # All are answered: the engine, which waits for the last request, starts now.
            begin = _server_seconds(calls.server_pid), time.process_time()
    assert begin is not None
    server, client = _server_seconds(calls.server_pid) - begin[0], time.process_time() - begin[1]
    return Received([stream.reading() for stream in streams], server, client)


def _server_seconds(pid: int) -> float:
    """Processor time of a process, children not included (proc(5): fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def main(calls: str, received: str) -> None:
    gc.disable()
    found = receive(msgspec.json.decode(Path(calls).read_bytes(), type=Calls))
    Path(received).write_bytes(msgspec.msgpack.encode(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
