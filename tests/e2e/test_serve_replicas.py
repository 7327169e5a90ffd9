"""``peft-dist serve --replicas 2`` from its options to its exit status, around fake replicas."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import httpx

from tests.e2e.test_serve import Server, adapter, events, serving
from tests.worker.fake_replica import SLOW

NUM_TOKENS = 300


def test_a_stream_outlives_a_drain_and_a_death(tmp_path: Path) -> None:
    sql = adapter(tmp_path / "sql", "two")
    options = ["--replicas", "2", "--adapter", f"sql={sql}", "--served-model-name", "tiny", "--seed", "3"]
    with serving(tmp_path, *options) as server:
        body = {"model": "sql", "prompt": [SLOW], "max_tokens": NUM_TOKENS, "seed": 7, "return_token_ids": True}
        alone = server.post("/v1/completions", body).json()["choices"][0]["token_ids"]
        assert len(alone) == NUM_TOKENS and len(server.children()) == 2
        load = {"lora_name": "json", "lora_path": str(adapter(tmp_path / "json", "one"))}
        assert server.post("/v1/load_lora_adapter", load).status_code == 200
        tokens: list[int] = []
        children = server.children()
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=100) as stream:
            for event in events(stream):
                [choice] = event["choices"]  # type: ignore[misc]
                tokens += choice["token_ids"]
                if len(tokens) == 50:
                    drained, child = busy(server), busy_child(server)
                    assert server.post(f"/admin/drain/{drained}", {"restart": True}).status_code == 200
                if len(tokens) == 60:
                    # Perhaps the one that was drained is not back yet: then nobody has the request for a while.
                    [other] = set(children) - {child}
                    os.kill(other, signal.SIGKILL)
        assert tokens == alone
        server.until(lambda: httpx.get(f"{server.url}/ready?replicas=2&warm=true").status_code == 200)
        answer = server.post("/v1/completions", {"model": "json", "prompt": [5], "max_tokens": 3})
        assert answer.status_code == 200
        metrics = httpx.get(f"{server.url}/metrics").text
        assert re.search(r'peft_dist:replicas\{state="ready"\} 2\.0', metrics)
        restarts = re.findall(r'peft_dist:replica_restarts_total\{replica="\d"\} (\d)', metrics)
        assert sum(map(int, restarts)) == 2
        assert re.search(r'peft_dist:migration_plans_total\{origin="\w+",trigger="\w+"\} [1-9]', metrics)
        assert server.stop() == 0
        assert "was killed by SIGKILL" in server.log and "is started again" in server.log


def busy(server: Server) -> int:
    """The replica that runs something."""
    found = re.findall(r'peft_dist:requests_running\{replica="(\d)"\} (\d)', httpx.get(f"{server.url}/metrics").text)
    [replica_id] = [int(replica_id) for replica_id, number in found if int(number)]
    return replica_id


def busy_child(server: Server) -> int:
    """Children are started in the order of their numbers."""
    return sorted(server.children())[busy(server)]


def test_a_server_of_replicas_that_join_says_where_before_any_has(tmp_path: Path) -> None:
    """Of a port that the system chooses nobody could know."""
    server = Server(tmp_path, "--replicas", "0", "--listen", "tcp://127.0.0.1:0")
    try:
        server.until(lambda: re.search(r"tcp://127\.0\.0\.1:[1-9]\d*.*peft-dist worker --join", server.log))
        assert "Loading" not in server.log and server.stop() == 0
    finally:
        server.process.kill()
        server.process.wait()
