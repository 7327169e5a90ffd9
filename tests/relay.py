"""A TCP relay that can stop forwarding, in either direction, without a reset: a link that is cut."""

from __future__ import annotations

import asyncio
import contextlib


class Relay:
    """Forwards every connection to a port. ``up`` is towards that port, ``down`` back from it.

    A direction that is not set holds what it has read until it is set again, as TCP does while packets are lost.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.up, self.down = asyncio.Event(), asyncio.Event()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
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

    def cut(self, *directions: asyncio.Event) -> None:
        for direction in directions:
            direction.clear()

    def heal(self) -> None:
        self.up.set()
        self.down.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # While the link is cut nobody answers a new connection either.
        await self.up.wait()
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        for source, target, direction in ((reader, far_writer, self.up), (far_reader, writer, self.down)):
            task = asyncio.create_task(self._forward(source, target, direction))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, direction: asyncio.Event
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                await direction.wait()
                target.write(data)
                await target.drain()
        await direction.wait()
        target.close()
