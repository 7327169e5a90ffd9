"""Two replicas with a real model on the CPU that are killed and stopped: every stream is what its request is alone."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from peft_dist import LLM, SamplingParams
from peft_dist.core.config import EngineConfig
from peft_dist.core.restarts import RestartPolicy
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.service import EngineService
from peft_dist.worker.launcher import AccelerateLauncher, PlainLauncher
from scripts.demo_model import ensure_demo_model
from tests.e2e.test_replicas import until
from tests.tiny_models import make_model, random_adapter, target_modules

ROOT = Path(__file__).parents[2]
ROUNDS = 10
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    # Of a large vocabulary as it is, about every draw lies within rounding of two tokens.
    {"temperature": 1.0, "top_k": 64},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 2},
]


@dataclass
class Case:
    """One request, what it is alone, and what its stream brought."""

    prompt: list[int]
    params: SamplingParams
    adapter: str | None
    expected: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    num_scores: int = 0
    times: list[float] = field(default_factory=list)

    async def run(self, service: EngineService, request_id: str) -> None:
        loop = asyncio.get_running_loop()
        async for _, progress in service.generate(request_id, self.prompt, self.params, self.adapter):
            assert progress.error is None and progress.first_index == len(self.tokens)
            self.tokens += progress.token_ids
            self.num_scores += len(progress.logprobs or ())
            self.times.append(loop.time())

    def forget(self) -> None:
        """Be ready to be streamed again."""
        self.tokens, self.num_scores, self.times = [], 0, []

    def longest_gap(self) -> float:
        return max(b - a for a, b in itertools.pairwise(self.times))


def make_cases(number: int, num_tokens: int, vocab_size: int, adapters: Sequence[str | None]) -> list[Case]:
    cases = []
    for i in range(number):
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=i, **KINDS[i % len(KINDS)])
        prompt = [3 + (7 * i + 5 * k) % (vocab_size - 3) for k in range(6 + i % 11)]
        cases.append(Case(prompt, params, adapters[(i // len(KINDS)) % len(adapters)]))
    return cases


def run_alone(model: Path | str, adapters: dict[str, str | Path], cases: list[Case], **options: Any) -> None:
    with LLM(model, adapters, device="cpu", **options) as llm:
        for case in cases:
            [output] = llm.generate([case.prompt], case.params, case.adapter, use_tqdm=False)
            case.expected = output.outputs[0].token_ids


async def kill_one_and_stop_the_other(service: EngineService, cases: list[Case], strides: tuple[int, int]) -> None:
    """Stream all cases; kill the busiest replica after some tokens, and stop the other one after some more."""
    reading = [asyncio.create_task(case.run(service, f"r{i}")) for i, case in enumerate(cases)]
    pids = service.replica_pids()
    running = {view.replica_id: view.stats.num_running for view in service.replicas()}
    first = max(running, key=lambda replica_id: running[replica_id])
    for replica_id, fault, goal in zip((first, 1 - first), (signal.SIGKILL, signal.SIGSTOP), strides, strict=True):
        await until(lambda goal=goal: sum(len(case.tokens) for case in cases) >= goal)
        assert not all(task.done() for task in reading), "the fault came too late to be one"
        os.kill(pids[replica_id], fault)
        await until(lambda gone=replica_id: service.replica_pids().get(gone) != pids[gone])
    await asyncio.gather(*reading)
    await until(lambda: len(service.replica_pids()) == 2)


def check(cases: list[Case]) -> None:
    for case in cases:
        assert case.tokens == case.expected
        assert case.num_scores == (len(case.tokens) if case.params.logprobs is not None else 0)


def serve_with_faults(
    config: EngineConfig,
    adapters: dict[str, str | Path],
    cases: list[Case],
    strides: tuple[int, int],
    silence: float,
    rounds: int = 1,
    kind: type[PlainLauncher] = AccelerateLauncher,
) -> list[float]:
    """Returns the longest gap of each stream, in seconds."""
    gaps: list[float] = []

    async def work() -> None:
        launcher = kind(config, log_level="error", heartbeat_seconds=silence / 5, num_replicas=2)
        restart = RestartPolicy(first=0.05, longest=1.0, max_failures=100)
        options = OrchestratorOptions(max_num_seqs=256, seed=1, heartbeat_timeout=silence, restart=restart)
        service = EngineService(launcher, options, num_replicas=2, stop_grace=5.0)
        try:
            await service.start()
            for name, path in adapters.items():
                await service.load_adapter(name, str(path))
            for _ in range(rounds):
                for case in cases:
                    case.forget()
                await kill_one_and_stop_the_other(service, cases, strides)
                check(cases)
                gaps.extend(case.longest_gap() for case in cases)
            assert [view.num_restarts for view in service.replicas()] == [rounds] * 2
        finally:
            await service.stop()

    asyncio.run(work())
    return gaps


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_tiny_model_killed_and_stopped(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    adapters: dict[str, str | Path] = {
        f"a{i}": random_adapter(model, tmp_path / f"a{i}", 4, 8.0, target_modules("llama"), seed=i) for i in range(2)
    }
    cases = make_cases(24, 200, 96, [None, *adapters])
    run_alone(tmp_path / "model", adapters, cases, num_blocks=512, num_threads=1)
    config = EngineConfig(model=str(tmp_path / "model"), device="cpu", num_threads=1, num_blocks=512)
    serve_with_faults(config, adapters, cases, (600, 1200), silence=2.0, kind=PlainLauncher)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_with_four_adapters_in_ten_rounds() -> None:
    model, folder = str(ensure_demo_model()), ROOT / "scripts" / "demo_adapters"
    adapters: dict[str, str | Path] = {name: folder / name for name in ("json", "sentiment", "sql", "style")}
    cases = make_cases(200, 40, 49_000, [None, *adapters])
    run_alone(model, adapters, cases, num_blocks=2048)
    config = EngineConfig(model=model, device="cpu", num_threads=1, num_blocks=2048)
    gaps = sorted(serve_with_faults(config, adapters, cases, (1500, 3500), silence=5.0, rounds=ROUNDS))
    print(f"longest gap of a stream: median {gaps[len(gaps) // 2]:.1f} s, longest {gaps[-1]:.1f} s")
