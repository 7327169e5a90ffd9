"""A TCP relay that can stop forwarding, in either direction, without a reset (a link that is cut), and reset
connections that come back at once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct


class Direction(asyncio.Event):
    """Set while it forwards. What it has read since it was cut is held, as TCP does while packets are lost.

    Attributes:
        held: Bytes that are held, of all connections together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = 0


class Relay:
    """Forwards every connection to ``tcp://HOST:PORT`` of this machine. ``up`` is towards it, ``down`` back from it."""

    def __init__(self, endpoint: str) -> None:
        self._target = int(endpoint.rpartition(":")[2])
        self.up, self.down = Direction(), Direction()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.heal()

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def address(self) -> str:
        assert self._server is not None
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self, *directions: Direction) -> None:
        for direction in directions:
            direction.clear()

    def heal(self) -> None:
        self.up.set()
        self.down.set()

    def reset(self) -> None:
        """Have every connection fail at both ends, with what is held of it; new ones are forwarded from now on."""
        writers, self._writers = self._writers, set()
        for writer in writers:
            # Closing sends a reset then, and what was not sent is dropped.
            ended = writer.get_extra_info("socket")
            ended.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        self.up.held = self.down.held = 0
        self.heal()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # While the link is cut nobody answers a new connection either.
        await self.up.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, far_writer}
        for source, target, direction in ((reader, far_writer, self.up), (far_reader, writer, self.down)):
            task = asyncio.create_task(self._forward(source, target, direction))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, direction: Direction) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                direction.held += len(data)
                await direction.wait()
                direction.held -= len(data)
                target.write(data)
                await target.drain()
        await direction.wait()
        self._writers.discard(target)
        target.close()
