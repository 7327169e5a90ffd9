"""``peft-dist serve --tensor-parallel-size 2`` around a real model, under ``accelerate launch``."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import httpx
import torch

from tests.e2e.test_serve import COMMAND, ROOT, Server
from tests.oracle import PeftOracle, assert_identical
from tests.tiny_models import make_model, random_adapter, target_modules

torch.set_num_threads(1)
LENGTH = 16
PROMPT = [5, 17, 44, 9, 60, 31, 8]


class SplitServer(Server):
    def __init__(self, folder: Path, *options: str) -> None:
        self.port_file, self.log_file = folder / "port", folder / "log"
        options = (
            *("--tensor-parallel-size", "2", "--device", "cpu", "--threads", "1", "--num-blocks", "64"),
            *("--port", "0", "--port-file", str(self.port_file), "--served-model-name", "tiny", *options),
        )
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, "serve", str(folder / "model"), *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )

    def ranks(self) -> list[int]:
        """Of the launches under way."""
        return sorted(rank for launch in self.children() for rank in children(launch))

    def answer(self, model: str) -> list[int]:
        body = {"model": model, "prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0.0, "ignore_eos": True}
        answer = self.post("/v1/completions", {**body, "return_token_ids": True})
        assert answer.status_code == 200, answer.text
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens


def children(process: int) -> list[int]:
    """None of one that has just ended."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{process}/task").glob("*/children"):
            found += map(int, file.read_text().split())
    return found


def runs(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_ranks_answer_as_one_and_die_as_one(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    adapters = {
        name: random_adapter(model, tmp_path / name, 4, 8.0, target_modules("llama"), seed=seed)
        for seed, name in enumerate(["early", "late"])
    }
    oracle = PeftOracle(model, adapters)

    def check(name: str) -> None:
        adapter = None if name == "tiny" else name
        tokens = server.answer(name)
        assert_identical(tokens, oracle.answer(PROMPT, adapter, LENGTH), oracle, PROMPT, adapter)

    options = ["--adapter", f"early={adapters['early']}", "--restart", "--heartbeat-timeout", "5"]
    server = SplitServer(tmp_path, *options, "--step-timeout", "5")
    try:
        server.until(server.port_file.exists)
        first = server.ranks()
        assert len(first) == 2
        check("tiny")
        check("early")
        load = {"lora_name": "late", "lora_path": str(adapters["late"])}
        assert server.post("/v1/load_lora_adapter", load).status_code == 200
        check("late")

        os.kill(first[1], signal.SIGKILL)
        server.until(lambda: not any(map(runs, first)))
        server.until(lambda: len(set(server.ranks()) - set(first)) == 2)
        server.until(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
        second = server.ranks()
        check("late")

        # Whichever it is, the other waits for it in the middle of a step.
        os.kill(second[1], signal.SIGSTOP)
        check("early")
        assert not any(map(runs, second))
        third = server.ranks()
        assert server.stop() == 0, server.log
        assert len(third) == 2 and not any(map(runs, third))
    finally:
        server.process.kill()
        server.process.wait()
