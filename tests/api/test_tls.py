"""HTTPS with the server's own files."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

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
