"""A server that is killed and started again: its workers go on, with their model and their adapters."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.test_processes import ended
from tests.e2e.test_serve import ROOT, Server, adapter
from tests.worker.fake_replica import HOLD

__all__ = ["ROOT"]


class Lives:
    """A server's lives, one after another, on one state folder."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, options
        self.servers: list[Server] = []

    def begin(self, *more: str, wait: bool = True) -> Server:
        folder = self.folder / f"life{len(self.servers)}"
        folder.mkdir()
        server = Server(folder, "--state-dir", str(self.folder / "state"), *self.options, *more)
        self.servers.append(server)
        if wait:
            server.until(server.port_file.exists)
        return server

    def workers(self) -> dict[int, int]:
        """Process id of each launch that is recorded."""
        import msgspec

        found = (self.folder / "state").glob("replica-*/process.json")
        return {int(path.parent.name[8:]): msgspec.json.decode(path.read_bytes())["pid"] for path in found}

    def end(self) -> None:
        for server in self.servers:
            if server.process.poll() is None:
                server.stop()
        for pid in self.workers().values():
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@contextmanager
def lives(folder: Path, *options: str) -> Iterator[Lives]:
    own = Lives(folder, *options)
    try:
        yield own
    finally:
        own.end()


def kill(server: Server) -> None:
    server.process.kill()
    server.process.wait()


def models(server: Server) -> dict[str, dict[str, Any]]:
    return {card["id"]: card for card in httpx.get(f"{server.url}/v1/models").json()["data"]}


def tokens(server: Server, **body: object) -> list[int]:
    answer = server.post("/v1/completions", {"max_tokens": 5, "return_token_ids": True, "seed": 3, **body})
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


def test_a_killed_server_finds_its_workers_and_their_adapters_again(tmp_path: Path) -> None:
    sql, web = adapter(tmp_path / "sql", "two"), adapter(tmp_path / "web", "three")
    with lives(tmp_path, "--adapter", f"sql={sql}") as own:
        first = own.begin()
        load = {"lora_name": "web", "lora_path": str(web), "pinned": True}
        assert first.post("/v1/load_lora_adapter", load).status_code == 200
        known, expected = models(first), tokens(first, model="web", prompt=[5])
        workers = own.workers()
        body = {"model": "sql", "prompt": [HOLD], "max_tokens": 400, "stream": True, "return_token_ids": True}
        with httpx.stream("POST", f"{first.url}/v1/completions", json=body, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            kill(first)
            with pytest.raises(httpx.HTTPError):
                list(lines)
        # What is read from now on would be something else.
        (sql / "adapter_config.json").write_text("bad")
        (web / "adapter_config.json").write_text("bad")
        second = own.begin()
        assert own.workers() == workers and "outlived the server" in second.log
        again = models(second)
        assert list(again) == list(known) and again["web"]["pinned"] and not again["sql"]["pinned"]
        assert tokens(second, model="web", prompt=[5]) == expected
        assert "peft_dist:requests_running" in httpx.get(f"{second.url}/metrics").text
        assert second.post("/v1/unload_lora_adapter", {"lora_name": "web"}).status_code == 200
        kill(second)
        third = own.begin()
        assert own.workers() == workers and list(models(third)) == [name for name in known if name != "web"]
        assert third.stop() == 0
        assert all(ended(pid) for pid in workers.values()) and own.workers() == {}
