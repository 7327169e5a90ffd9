"""``peft-dist serve --tensor-parallel-size 2`` around a real model, under ``accelerate launch``."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch

from tests.e2e.test_serve import Server, children
from tests.oracle import PeftOracle, assert_identical
from tests.tiny_models import make_model, random_adapter, target_modules

torch.set_num_threads(1)
LENGTH = 16
PROMPT = [5, 17, 44, 9, 60, 31, 8]


class SplitServer(Server):
    def __init__(self, folder: Path, *options: str) -> None:
        split = ("--tensor-parallel-size", "2", "--device", "cpu", "--threads", "1", "--num-blocks", "64")
        options = (*split, "--served-model-name", "tiny", *options)
        self._start(folder, folder / "model", options, {**os.environ, "HF_HUB_OFFLINE": "1"})

    def ranks(self) -> list[int]:
        """Of the launches under way."""
        return sorted(rank for launch in self.children() for rank in children(launch))

    def answer(self, model: str) -> list[int]:
        body = {"model": model, "prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0.0, "ignore_eos": True}
        answer = self.post("/v1/completions", {**body, "return_token_ids": True})
        assert answer.status_code == 200, answer.text
        tokens: list[int] = answer.json()["choices"][0]["token_ids"]
        return tokens


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Scene:
    """A server of two ranks, PEFT beside it, and two adapters of which the server has one."""

    def __init__(self, folder: Path, *options: str) -> None:
        model = make_model("llama", folder / "model")
        self.adapters = {
            name: random_adapter(model, folder / name, 4, 8.0, target_modules("llama"), seed=seed)
            for seed, name in enumerate(["early", "late"])
        }
        self.oracle = PeftOracle(model, self.adapters)
        self.server = SplitServer(folder, "--adapter", f"early={self.adapters['early']}", *options)

    def check(self, name: str) -> None:
        adapter = None if name == "tiny" else name
        answer = self.oracle.answer(PROMPT, adapter, LENGTH)
        assert_identical(self.server.answer(name), answer, self.oracle, PROMPT, adapter)


@contextlib.contextmanager
def scene(folder: Path, *options: str) -> Iterator[Scene]:
    made = Scene(folder, *options)
    try:
        made.server.until(made.server.port_file.exists)
        yield made
    finally:
        made.server.process.kill()
        made.server.process.wait()


def test_two_ranks_answer_as_one(tmp_path: Path) -> None:
    with scene(tmp_path) as it:
        ranks = it.server.ranks()
        assert len(ranks) == 2
        it.check("tiny")
        it.check("early")
        load = {"lora_name": "late", "lora_path": str(it.adapters["late"])}
        assert it.server.post("/v1/load_lora_adapter", load).status_code == 200
        it.check("late")
        assert it.server.post("/v1/unload_lora_adapter", {"lora_name": "early"}).status_code == 200
        it.check("late")
        assert it.server.stop() == 0, it.server.log
        assert not any(map(runs, ranks)) and "Traceback" not in it.server.log


@pytest.mark.slow
def test_ranks_die_as_one(tmp_path: Path) -> None:
    # Not by --step-timeout: that is five minutes, for steps are allowed to be long.
    with scene(tmp_path, "--restart", "--heartbeat-timeout", "5") as it:
        server, first = it.server, it.server.ranks()
        os.kill(first[1], signal.SIGKILL)
        server.until(lambda: not any(map(runs, first)))
        server.until(lambda: len(set(server.ranks()) - set(first)) == 2)
        server.until(lambda: httpx.get(f"{server.url}/ready").status_code == 200)
        second = server.ranks()
        it.check("early")
        # The other waits for it in the middle of a step.
        os.kill(second[1], signal.SIGSTOP)
        it.check("early")
        assert not any(map(runs, second))
        third = server.ranks()
        assert server.stop() == 0, server.log
        assert len(third) == 2 and not any(map(runs, third))


@pytest.mark.slow
def test_a_model_that_cannot_be_split_is_refused_in_words(tmp_path: Path) -> None:
    make_model("gpt2", tmp_path / "model")
    server = SplitServer(tmp_path)
    assert server.process.wait(timeout=60) != 0
    reason = "tensor_parallel_size=2: transformers has no plan for splitting GPT2LMHeadModel over ranks. Choose another"
    assert reason in server.log.splitlines()[-1]
