"""The socket that clients reach, and uvicorn behind it on the running event loop."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from peft_dist.api.unread import SEND_BUFFER_BYTES, UnreadWatch
from peft_dist.core.errors import ConfigError

# What an answer that was failed at the end of the grace period gets for reaching its client.
_FLUSH_SECONDS = 5
# Longer than clients (5 s) and proxies (60 s) keep a connection that nothing goes over: whoever asks on one again must
# not find it closed while the request is on its way.
_KEEP_ALIVE_SECONDS = 75


@dataclass(frozen=True, slots=True)
class Tls:
    """Files with the server's certificate, others up to a known one behind it, and the key, if not in the same file."""

    certificate: Path
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """With Python's own choice of protocols and ciphers. Raises ConfigError where the files cannot be used."""
        names = f"--ssl-certfile {self.certificate}" + (f" and --ssl-keyfile {self.key}" if self.key else "")
        try:
            # Without a password: nobody is there to type one.
            made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            made.load_cert_chain(self.certificate, self.key, password=lambda: b"")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{names} cannot be used ({error}): give PEM files that belong together, with a key without password"
            ) from error
        made.set_alpn_protocols(["http/1.1"])
        return made


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs it, and tells when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.listening.set()


class Listener:
    """Binds at once, so that a port in use is known before a model is loaded; answers from ``start`` on.

    Raises:
        ConfigError: the address cannot be used.
    """

    def __init__(self, host: str, port: int, tls: Tls | None = None) -> None:
        self._host = host
        self._tls = None if tls is None else tls.context()
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, address = found[0]
            self._socket = socket.socket(family, socket.SOCK_STREAM)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            self._socket.bind(address)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host} port {port} ({error}): choose another --host or --port"
            ) from error
        self.port: int = self._socket.getsockname()[1]
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """The address it listens on, as a URL."""
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://{f'[{self._host}]' if ':' in self._host else self._host}:{self.port}"

    async def start(self, app: Any, shutdown_timeout: float, unread: UnreadWatch) -> asyncio.Task[None]:
        """Answer with ``app`` from now on; the task ends when ``finish`` was called and every answer is sent.

        ``unread``: What cuts connections of clients that read nothing.
        """
        config = uvicorn.Config(
            app,
            lifespan="off",
            proxy_headers=False,
            access_log=False,
            log_config=None,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(shutdown_timeout) + _FLUSH_SECONDS,
        )
        config.load()
        config.ssl = self._tls
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        listening = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait({self._task, listening}, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            listening.cancel()
            await self._task
        self._watching = asyncio.create_task(unread.run(self._server.server_state.connections))
        return self._task

    def finish(self) -> None:
        """Accept nothing any more; answers under way go on."""
        if self._server is not None:
            self._server.should_exit = True

    async def close(self) -> None:
        """Finish, and wait until every answer is sent."""
        self.finish()
        if self._task is not None:
            await self._task
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        self._socket.close()


def write_port(path: Path, port: int) -> None:
    """Write the port for whoever waits for it; the file is never seen half written."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(f"{port}\n")
    part.replace(path)
