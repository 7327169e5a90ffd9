"""A killed or stopped server with a real model, under accelerate: the same answers from the same processes, no second
load."""

from __future__ import annotations

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from peft_dist.worker.survivors import started_at
from tests.e2e.test_processes import ended
from tests.e2e.test_restart import Lives, hold, kill, running
from tests.e2e.test_serve import Server, children
from tests.tiny_models import make_model, random_adapter, target_modules

PROMPT = [5, 17, 44, 9, 60, 31, 8]
HERE = ("--device", "cpu", "--threads", "1", "--num-blocks", "64", "--served-model-name", "tiny")


class ModelServer(Server):
    def __init__(self, folder: Path, model: Path, *options: str) -> None:
        self._start(folder, model, [*HERE, *options], {**os.environ, "HF_HUB_OFFLINE": "1"})

    def answer(self, model: str) -> list[int]:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        answer = self.post("/v1/completions", {**body, "return_token_ids": True})
        assert answer.status_code == 200, answer.text
        found: list[int] = answer.json()["choices"][0]["token_ids"]
        return found

    def loads(self) -> int:
        """Adapters that were brought to the device, as the replica counts them."""
        metrics = httpx.get(f"{self.url}/metrics").text
        return sum(map(int, re.findall(r"peft_dist:adapter_loads_total\{[^}]*\} (\d+)", metrics)))


class ModelLives(Lives):
    def _start(self, folder: Path, *options: str) -> ModelServer:
        return ModelServer(folder, self.folder / "model", *options)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("ranks", [1, 2])
def test_answers_are_the_same_and_nothing_is_loaded_again(ranks: int, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    for number in range(2):
        random_adapter(model, tmp_path / f"a{number}", 4, 8.0, target_modules("llama"), seed=number)
    split = ("--tensor-parallel-size", str(ranks)) if ranks > 1 else ()
    own = ModelLives(tmp_path, *split, "--adapter", f"a0={tmp_path / 'a0'}", "--orphan-timeout", "20")
    try:
        first = own.begin()
        assert isinstance(first, ModelServer)
        load = {"lora_name": "a1", "lora_path": str(tmp_path / "a1")}
        assert first.post("/v1/load_lora_adapter", load).status_code == 200
        expected = {name: first.answer(name) for name in ("tiny", "a0", "a1")}
        assert len(set(map(tuple, expected.values()))) == 3
        workers = own.workers()
        processes = {pid: started_at(pid) for pid in children(workers[0])}
        assert len(processes) == ranks
        streams = [hold(first, name, PROMPT, 50) for name in expected]
        for stream in streams:
            next(stream)
        kill(first)
        second = own.begin()
        assert isinstance(second, ModelServer)
        assert {name: second.answer(name) for name in expected} == expected
        # The replica's own count, over its whole life; what was told of it in the first may be a second old.
        assert second.loads() == 2
        assert own.workers() == workers and {pid: started_at(pid) for pid in processes} == processes
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]
        kill(second)
        assert all(ended(pid, 60.0) for pid in (*processes, *workers.values())), "nobody came"
    finally:
        own.end()


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_that_was_stopped_has_the_same_answers_and_nothing_is_loaded_again(ranks: int, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    random_adapter(model, tmp_path / "a0", 4, 8.0, target_modules("llama"), seed=0)
    split = ("--tensor-parallel-size", str(ranks)) if ranks > 1 else ()
    own = ModelLives(tmp_path, *split, "--adapter", f"a0={tmp_path / 'a0'}", "--heartbeat-timeout", "2")
    body = {"prompt": PROMPT, "max_tokens": 240, "seed": 3, "ignore_eos": True, "return_token_ids": True}

    def ask(name: str) -> list[int]:
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": name, **body}, timeout=150)
        assert answer.status_code == 200, answer.text
        found: list[int] = answer.json()["choices"][0]["token_ids"]
        return found

    try:
        # One at a time, so that it takes longer than a server may be silent.
        server = own.begin("--max-num-seqs", "1")
        assert isinstance(server, ModelServer)
        expected = {name: ask(name) for name in ("tiny", "a0")}
        processes = {pid: started_at(pid) for pid in children(own.workers()[0])}
        with ThreadPoolExecutor(4) as pool:
            answers = [(name, pool.submit(ask, name)) for name in expected for _ in range(2)]
            server.until(lambda: running(server) == 1)
            os.kill(server.process.pid, signal.SIGSTOP)
            while "its requests are dropped" not in server.log:
                time.sleep(0.02)
            os.kill(server.process.pid, signal.SIGCONT)
            for name, answer in answers:
                assert answer.result(150) == expected[name]
        assert "and it goes on with what it holds" in server.log and server.loads() == 1
        assert {pid: started_at(pid) for pid in children(own.workers()[0])} == processes and len(processes) == ranks
        assert server.stop() == 0
    finally:
        own.end()
