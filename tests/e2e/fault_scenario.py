"""Replicas with a real model that lose what they run on, under load: every stream is what its request is alone.

One body for whatever runs the replicas.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from peft_dist import LLM, SamplingParams
from peft_dist.core.config import EngineConfig
from peft_dist.core.restarts import RestartPolicy
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.link import Link
from peft_dist.orchestrator.replica_process import ReplicaLauncher
from peft_dist.orchestrator.service import EngineService
from peft_dist.worker.launcher import AccelerateLauncher, PlainLauncher
from tests.e2e.disturbances import Disturbances
from tests.e2e.test_replicas import until

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    # Of a large vocabulary as it is, about every draw lies within rounding of two tokens.
    {"temperature": 1.0, "top_k": 64},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 2},
]

Fault = Callable[[EngineService, int], Awaitable[None]]
"""Takes away what a replica runs on."""
Started = tuple[ReplicaLauncher, Link | None]
"""A launcher, and the socket that its replicas connect to if it is not the usual one."""


@dataclass
class Case:
    """One request, what it is alone, and what its stream brought.

    Attributes:
        expected, text: Tokens, and the text of them where the model has a tokenizer.
        tokens, num_scores: Of its last stream.
        num_tokens, gaps: Over all its streams: the tokens, and the longest gap of each in seconds.
    """

    prompt: list[int]
    params: SamplingParams
    adapter: str | None
    expected: list[int] = field(default_factory=list)
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    num_scores: int = 0
    num_tokens: int = 0
    gaps: list[float] = field(default_factory=list)

    async def run(self, service: EngineService, request_id: str, beside: Disturbances | None = None) -> None:
        """Stream it."""
        loop = asyncio.get_running_loop()
        self.tokens = []
        times: list[float] = []
        self.num_scores = 0
        async for _, progress in service.generate(request_id, self.prompt, self.params, self.adapter):
            assert progress.error is None and progress.first_index == len(self.tokens)
            self.tokens += progress.token_ids
            self.num_tokens += len(progress.token_ids)
            self.num_scores += len(progress.logprobs or ())
            times.append(loop.time())
            if beside is not None:
                beside.tokens_came(service, request_id)
        self.gaps.append(max((b - a for a, b in itertools.pairwise(times)), default=0.0))

    def check(self) -> None:
        """That its last stream is what it is alone."""
        assert self.tokens == self.expected
        assert self.num_scores == (len(self.tokens) if self.params.logprobs is not None else 0)


@dataclass(frozen=True)
class Outcome:
    """Of all rounds together.

    Attributes:
        restored: Seconds of each round from its last fault until there were as many replicas as before.
        gaps: Longest gap of each request's stream, in seconds.
    """

    restored: list[float]
    gaps: list[float]

    def __str__(self) -> str:
        gaps, seconds = sorted(self.gaps), ", ".join(f"{seconds:.1f}" for seconds in self.restored)
        return (
            f"{len(gaps)} requests, 0 lost; all replicas again after {seconds} s; longest gap of a stream: median "
            f"{gaps[len(gaps) // 2]:.1f} s, longest {gaps[-1]:.1f} s"
        )


class Machines(Protocol):
    """What runs the replicas."""

    def launcher(self, config: EngineConfig, num_replicas: int, heartbeat: float) -> Started:
        """For so many replicas, with so many seconds between two signs of life."""
        ...

    async def take_away(self, service: EngineService, replica_id: int) -> None:
        """What a replica runs on; there is something else in its place."""
        ...


class ThisHost:
    """Processes of this host: the launcher's own supervisor is what starts them again."""

    def __init__(self, kind: type[PlainLauncher] = AccelerateLauncher) -> None:
        self._kind = kind

    def launcher(self, config: EngineConfig, num_replicas: int, heartbeat: float) -> Started:
        launcher = self._kind(config, log_level="error", heartbeat_seconds=heartbeat, num_replicas=num_replicas)
        return launcher, None

    async def take_away(self, service: EngineService, replica_id: int) -> None:
        os.kill(service.replica_pids()[replica_id], signal.SIGKILL)

    async def stop(self, service: EngineService, replica_id: int) -> None:
        os.kill(service.replica_pids()[replica_id], signal.SIGSTOP)


def make_cases(number: int, num_tokens: int, vocab_size: int, adapters: Sequence[str | None]) -> list[Case]:
    cases = []
    for i in range(number):
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=i, **KINDS[i % len(KINDS)])
        prompt = [3 + (7 * i + 5 * k) % (vocab_size - 3) for k in range(6 + i % 11)]
        cases.append(Case(prompt, params, adapters[(i // len(KINDS)) % len(adapters)]))
    return cases


def run_alone(model: Path | str, adapters: dict[str, str | Path], cases: list[Case], **options: Any) -> None:
    with LLM(model, adapters, **{"device": "cpu", **options}) as llm:
        for case in cases:
            [output] = llm.generate([case.prompt], case.params, case.adapter, use_tqdm=False)
            case.expected, case.text = output.outputs[0].token_ids, output.outputs[0].text


async def one_round(
    service: EngineService,
    cases: list[Case],
    faults: Sequence[tuple[int, Fault]],
    num_replicas: int,
    again: bool,
    beside: Disturbances | None = None,
) -> float:
    """Stream all cases while faults come, and wait until all replicas are there again.

    Args:
        faults: Each with the tokens that are to be there before it. The first befalls the busiest replica, the next
            one another.
        again: Stream each of them again and again until then.
        beside: What else happens meanwhile.

    Returns seconds from the last fault until all replicas were there.
    """
    loop = asyncio.get_running_loop()
    restored = asyncio.Event()
    before = sum(case.num_tokens for case in cases)

    def drawn() -> int:
        return sum(case.num_tokens for case in cases) - before

    async def stream(case: Case, name: str) -> None:
        for number in itertools.count():
            await case.run(service, f"{name}.{number}", beside)
            case.check()
            if restored.is_set() or not again:
                return

    streams = [asyncio.create_task(stream(case, f"r{i}")) for i, case in enumerate(cases)]
    reading = list(streams)
    if beside is not None:
        reading.append(asyncio.create_task(beside.change_adapters(service, restored)))

    async def reach(condition: Callable[[], bool]) -> None:
        """Wait for it, unless a stream is not what it should be."""
        await until(lambda: condition() or any(task.done() and task.exception() for task in reading))
        for task in reading:
            if task.done():
                task.result()

    try:
        pids = service.replica_pids()
        assert len(pids) == num_replicas
        await reach(lambda: drawn() >= faults[0][0])
        running = {view.replica_id: view.stats.num_running for view in service.replicas()}
        victims = sorted(running, key=lambda replica_id: -running[replica_id])
        for victim, (goal, fault) in zip(victims, faults, strict=False):
            await reach(lambda goal=goal: drawn() >= goal)
            assert not all(task.done() for task in streams), "the fault came too late to be one"
            begun = loop.time()
            await fault(service, victim)
            await reach(lambda gone=victim: service.replica_pids().get(gone) != pids[gone])
        await reach(lambda: len(service.replica_pids()) == num_replicas)
        seconds = loop.time() - begun
        restored.set()
        await asyncio.gather(*reading)
        return seconds
    finally:
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)


def serve_with_faults(
    config: EngineConfig,
    adapters: dict[str, str | Path],
    cases: list[Case],
    faults: Sequence[tuple[int, Fault]],
    machines: Machines,
    num_replicas: int = 2,
    silence: float = 2.0,
    rounds: int = 1,
    again: bool = False,
    beside: Disturbances | None = None,
) -> Outcome:
    """``silence``: Seconds without a word of a replica after which it is given up. Others: As in ``one_round``."""

    async def work() -> Outcome:
        launcher, link = machines.launcher(config, num_replicas, silence / 5)
        restart = RestartPolicy(first=0.05, longest=1.0, max_failures=100)
        options = OrchestratorOptions(max_num_seqs=256, seed=1, heartbeat_timeout=silence, restart=restart)
        service = EngineService(launcher, options, num_replicas=num_replicas, stop_grace=5.0, link=link)
        try:
            await service.start()
            for name, path in adapters.items():
                await service.load_adapter(name, str(path))
            restored = [await one_round(service, cases, faults, num_replicas, again, beside) for _ in range(rounds)]
            assert sum(view.num_restarts for view in service.replicas()) == rounds * len(faults)
        finally:
            await service.stop()
        return Outcome(restored, [gap for case in cases for gap in case.gaps])

    return asyncio.run(work())
