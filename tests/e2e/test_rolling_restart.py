"""``peft-dist rolling-restart`` under streams, around fake replicas in processes of their own."""

from __future__ import annotations

import hashlib
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.test_serve import COMMAND, ROOT, Server, adapter, events, serving
from tests.worker.fake_replica import SLOW, expected_token

NUM_STREAMS = 16
NUM_TOKENS = 200


def body(number: int) -> dict[str, object]:
    model = ("tiny", "sql")[number % 2]
    sampling = {"max_tokens": NUM_TOKENS, "seed": number, "return_token_ids": True}
    return {"model": model, "prompt": [SLOW, number], **sampling}


def expected(number: int) -> list[int]:
    """The answer to ``body``, whoever gives it."""
    content = hashlib.sha256(b"two").hexdigest()[:8] if number % 2 else ""
    return [expected_token(number, 0, draw, content) for draw in range(NUM_TOKENS)]


class Traffic:
    """Clients that ask one request after another until they are told to stop."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._pool = ThreadPoolExecutor(NUM_STREAMS)
        self._stop = threading.Event()
        self.begun = threading.Semaphore(0)
        self._clients = [self._pool.submit(self._ask, number) for number in range(NUM_STREAMS)]

    def _ask(self, number: int) -> list[list[int]]:
        answers = []
        while not self._stop.is_set() or not answers:
            tokens: list[int] = []
            asked = {**body(number), "stream": True}
            with httpx.stream("POST", f"{self._server.url}/v1/completions", json=asked, timeout=200) as stream:
                assert stream.status_code == 200, stream.read()
                for event in events(stream):
                    if not tokens:
                        self.begun.release()
                    tokens += event["choices"][0]["token_ids"]  # type: ignore[index]
            answers.append(tokens)
        return answers

    def end(self) -> list[list[list[int]]]:
        """All answers of each client; raises what went wrong with one."""
        self._stop.set()
        try:
            return [client.result(120) for client in self._clients]
        finally:
            self._pool.shutdown()


def restart(server: Server) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "rolling-restart", server.url]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_every_replica_is_renewed_and_no_stream_notices(tmp_path: Path) -> None:
    sql = adapter(tmp_path / "sql", "two")
    options = ["--replicas", "2", "--adapter", f"sql={sql}", "--served-model-name", "tiny"]
    with serving(tmp_path, *options) as server:
        before = server.children()
        traffic = Traffic(server)
        try:
            for _ in range(NUM_STREAMS):
                assert traffic.begun.acquire(timeout=200)
            done = restart(server)
            ready = httpx.get(f"{server.url}/ready?replicas=2")
        finally:
            answers = traffic.end()
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "2 of 2 replicas restarted" and "replica 1 is " in done.stdout
        assert ready.status_code == 200, "it ends when all serve again"
        assert not set(before) & set(server.children()) and len(server.children()) == 2
        for number, own in enumerate(answers):
            assert all(tokens == expected(number) for tokens in own), "a token was lost, doubled or another one"
        view = httpx.get(f"{server.url}/admin/rolling-restart").json()
        assert (view["state"], view["restarted"]) == ("done", [0, 1])
        assert server.stop() == 0 and "Traceback" not in server.log


@pytest.mark.slow
def test_it_stops_with_the_reason_where_one_does_not_come_back(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    factory = ["--replica-factory", "tests.worker.fake_replica:build_unless_broken"]
    with serving(tmp_path, "--replicas", "2", *factory, FAKE_BROKEN=str(broken)) as server:
        kept = server.children()
        broken.touch()
        stopped = restart(server)
        assert stopped.returncode == 1
        assert "replica 0 did not come back" in stopped.stderr and "the fake is broken" in stopped.stderr
        assert len(set(kept) & set(server.children())) == 1, "the other one was left as it was"
        name = server.post("/v1/completions", {"model": "worker", "prompt": [5], "max_tokens": 2})
        assert name.status_code == 200 and httpx.get(f"{server.url}/ready").json()["serving"] == 1
        broken.unlink()
        server.until(lambda: httpx.get(f"{server.url}/ready?replicas=2").status_code == 200)
        assert restart(server).returncode == 0
        server.stop()


def test_it_stops_with_the_reason_where_one_comes_back_without_an_adapter(tmp_path: Path) -> None:
    sql, web = adapter(tmp_path / "sql", "two"), adapter(tmp_path / "web", "three")
    options = ["--replicas", "2", "--adapter", f"sql={sql}", "--adapter", f"web={web}"]
    with serving(tmp_path, *options) as server:
        config = sql / "adapter_config.json"
        kept, good = server.children(), config.read_text()
        config.write_text("bad")
        stopped = restart(server)
        assert stopped.returncode == 1 and "replica 0 came back and refused adapter 'sql': " in stopped.stderr
        assert len(set(kept) & set(server.children())) == 1, "the one that holds it was left as it was"
        ready = httpx.get(f"{server.url}/ready?adapters=all")
        assert ready.status_code == 200 and ready.json()["refused"] == {"0": ["sql"]} and ready.json()["serving"] == 1
        assert httpx.get(f"{server.url}/ready?replicas=2").status_code == 503
        assert 'peft_dist:adapters_refused{replica="0"} 1.0' in httpx.get(f"{server.url}/metrics").text
        for model in ("sql", "web"):
            answer = server.post("/v1/completions", {"model": model, "prompt": [5], "max_tokens": 2})
            assert answer.status_code == 200
        config.write_text(good)
        assert restart(server).returncode == 0, "the next one heals it"
        assert httpx.get(f"{server.url}/ready?replicas=2").json()["status"] == "ok"
        server.stop()


def test_it_is_refused_where_nobody_would_serve_meanwhile(tmp_path: Path) -> None:
    with serving(tmp_path) as lone:
        refused = restart(lone)
        assert refused.returncode == 1 and "answers 409: there is one replica" in refused.stderr
        assert httpx.get(f"{lone.url}/ready").status_code == 200
