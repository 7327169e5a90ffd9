"""A server of OpenAI's completions that is none of ours: plain SSE over sockets, without running usage or metrics."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@dataclass
class Peer:
    """Answers with one word for each token, one event each.

    Models with a name of their own: "unknown" is a 404, "broken" breaks off after a token, "sick" sends an error event,
    "mute" never answers, "short" stops after one token, "busy" calls ``block`` before it answers.
    """

    block: Callable[[], None] = lambda: None
    usage: dict[str, Any] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    readies: list[tuple[int, str]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            if head.startswith("get /metrics"):
                self._metrics(writer)
            elif head.startswith("get /ready"):
                self.asked.append(head.split()[1])
                status, text = self.readies.pop(0) if self.readies else (404, "")
                line = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                writer.write(line % (status, len(text), text.encode()))
            else:
                length = next(int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:"))
                self.keys += [line[15:] for line in head.split("\r\n") if line.startswith("authorization: ")]
                await self._answer(json.loads(await reader.readexactly(length)), writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # The client went away, which a test may be about.
        finally:
            writer.close()

    def _metrics(self, writer: asyncio.StreamWriter) -> None:
        if not self.metrics:
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        text = self.metrics.pop(0).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))

    async def _answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.bodies.append(body)
        model, count = body["model"], body["max_tokens"]
        if model == "unknown":
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 7\r\n\r\nno such")
            return
        if model == "mute":
            await reader_end(writer)
            return
        if model == "busy":
            self.block()
        writer.write(HEAD + b": a comment\r\n\r\n")
        for number in range(1 if model in ("broken", "short", "sick") else count):
            await self._send(writer, {"choices": [{"index": 0, "text": f" w{number}", "finish_reason": None}]})
        if model == "sick":
            await self._send(writer, {"error": {"message": "out of memory"}})
        elif model != "broken":
            await self._send(writer, {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
            if self.usage:
                await self._send(writer, {"choices": [], "usage": self.usage})
            writer.write(b"data: [DONE]\r\n\r\n")
        await writer.drain()

    async def _send(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        data = f"data: {json.dumps(event)}\r\n\r\n".encode()
        # Cut in the middle of an event.
        for part in (data[:9], data[9:]):
            writer.write(part)
            await writer.drain()


async def reader_end(writer: asyncio.StreamWriter) -> None:
    """Wait until the client closes."""
    await writer.wait_closed() if writer.is_closing() else await asyncio.Event().wait()


@asynccontextmanager
async def running(peer: Peer) -> AsyncIterator[Peer]:
    server = await asyncio.start_server(peer.serve, "127.0.0.1", 0)
    peer.port = server.sockets[0].getsockname()[1]
    try:
        yield peer
    finally:
        server.close()
