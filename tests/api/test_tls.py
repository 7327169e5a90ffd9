"""HTTPS with the server's own files."""

from __future__ import annotations

import asyncio
import socket
import ssl
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from peft_dist.api.listener import Listener, Tls
from peft_dist.api.unread import UnreadWatch
from peft_dist.core.errors import ConfigError
from tests.api.certificates import CERTIFICATE, KEY, KEY_WITH_PASSWORD
from tests.api.test_listener import answer


def test_clients_reach_it_by_https_alone(tmp_path: Path) -> None:
    for name, text in (("cert", CERTIFICATE), ("key", KEY), ("both", CERTIFICATE + KEY)):
        (tmp_path / name).write_text(text)

    async def main(tls: Tls) -> None:
        listener = Listener("127.0.0.1", 0, tls)
        assert listener.url == f"https://127.0.0.1:{listener.port}"
        ended = await listener.start(answer, 1.0, UnreadWatch(60.0))
        async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=tmp_path / "cert")) as client:
            assert (await client.get(listener.url)).text == "ok"
            with pytest.raises(httpx.TransportError):
                await client.get(f"http://127.0.0.1:{listener.port}")
        listener.finish()
        await ended

    asyncio.run(main(Tls(tmp_path / "cert", tmp_path / "key")))
    asyncio.run(main(Tls(tmp_path / "both")))


def test_files_that_are_of_no_use_are_told_at_once(tmp_path: Path) -> None:
    for name, text in (("cert", CERTIFICATE), ("locked", KEY_WITH_PASSWORD), ("none", "no PEM")):
        (tmp_path / name).write_text(text)
    for certificate, key in (("cert", None), ("missing", None), ("cert", "none"), ("none", None), ("cert", "locked")):
        with pytest.raises(ConfigError, match=r"--ssl-certfile .* cannot be used .*: give PEM files that belong"):
            Listener("127.0.0.1", 0, Tls(tmp_path / certificate, key and tmp_path / key))


def test_a_client_that_reads_nothing_is_cut_by_https_too(tmp_path: Path) -> None:
    """All that is left of its answer may lie beneath the encryption, where the transport does not count it."""
    (tmp_path / "both").write_text(CERTIFICATE + KEY)

    async def main() -> None:
        listener, watch = Listener("127.0.0.1", 0, Tls(tmp_path / "both")), UnreadWatch(0.8)
        await listener.start(medium_answer, 1.0, watch)
        plain = socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plain.connect(("127.0.0.1", listener.port))
        context = ssl.create_default_context(cafile=tmp_path / "both")
        stalled = await asyncio.to_thread(context.wrap_socket, plain, server_hostname="localhost")
        with closing(stalled):
            stalled.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            while not watch.num_cut:
                await asyncio.sleep(0.05)
        await listener.close()

    asyncio.run(asyncio.wait_for(main(), 60))


async def medium_answer(scope: dict[str, Any], receive: Any, send: Any) -> None:
    size = 200 << 10
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
    await send({"type": "http.response.body", "body": bytes(size)})
