"""Two replicas in processes of their own, on a small real model: requests move with their KV while they stream."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from peft_dist.core.config import EngineConfig
from peft_dist.core.restarts import RestartPolicy
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.service import EngineService
from peft_dist.worker.launcher import PlainLauncher
from tests.e2e.test_processes import run
from tests.tiny_models import make_model, random_adapter, target_modules

# Starting two processes with torch takes half a minute on two busy cores; around fakes: test_replicas.py.
pytestmark = pytest.mark.slow
NUM_TOKENS = 60
PROMPT = [5 + i % 60 for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("handover_processes")
    model = make_model("gemma3", root / "base")
    random_adapter(model, root / "a", 4, 8.0, target_modules("gemma3"))
    return root


@asynccontextmanager
async def started(folder: Path) -> AsyncIterator[EngineService]:
    config = EngineConfig(
        str(folder / "base"),
        device="cpu",
        dtype="float32",
        max_model_len=200,
        block_size=4,
        num_blocks=400,
        num_threads=1,
    )
    launcher = PlainLauncher(config, log_level="error", heartbeat_seconds=0.5, num_replicas=2)
    restart = RestartPolicy(first=0.01, longest=0.1)
    # No moves but those that are asked for: on busy cores a plan may find some too.
    options = OrchestratorOptions(64, 64, 1, restart=restart, migration="proactive")
    service = EngineService(launcher, options, num_replicas=2, stop_grace=5.0)
    try:
        await service.start()
        await service.load_adapter("a", str(folder / "a"))
        yield service
    finally:
        await service.stop()


def owner(service: EngineService, name: str) -> int | None:
    running = service._core._requests.running(name)
    return running[0][0].replica_id if running else None


def has_drawn(service: EngineService, name: str) -> bool:
    return any(sequence.output_token_ids for _, sequence in service._core._requests.running(name))


async def read(
    service: EngineService, name: str, params: SamplingParams, model: str | None, move_at: frozenset[int] = frozenset()
) -> list[int]:
    """The tokens of a request, which is asked to move whenever it has so many."""
    tokens: list[int] = []
    async for _, progress in service.generate(name, PROMPT, params, model):
        assert progress.first_index == len(tokens) and progress.error is None
        tokens += progress.token_ids
        if len(tokens) in move_at and (replica_id := owner(service, name)) is not None:
            service.move_request(name, 1 - replica_id, with_kv=True)
    return tokens


def kinds() -> list[tuple[SamplingParams, str | None]]:
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    sampled = SamplingParams(temperature=0.9, top_k=8, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True)
    return [(params, model) for params in (greedy, sampled) for model in (None, "a")]


async def blocks_are_free(service: EngineService) -> None:
    while any(view.stats.num_free_blocks != view.stats.num_blocks for view in service.replicas()):
        await asyncio.sleep(0.01)


def memory_of(pid: int) -> list[str]:
    """Memory files that a process has open."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(entry.readlink()))
    return [link for link in found if "peft-dist-kv" in link]


def test_streams_move_with_their_kv_and_notice_nothing(folder: Path) -> None:
    async def work() -> None:
        async with started(folder) as service:
            alone = [await read(service, f"alone{i}", *kind) for i, kind in enumerate(kinds())]
            rng = random.Random(0)
            moving = [
                read(service, f"m{i}", *kind, frozenset(rng.sample(range(1, NUM_TOKENS), 10)))
                for i, kind in enumerate(kinds() * 2)
            ]
            assert await asyncio.gather(*moving) == alone * 2
            handover = service._core.handover
            assert handover.num_with_kv > 20 and not handover.num_failed and not handover.num_recomputed
            await blocks_are_free(service)
            assert [memory_of(pid) for pid in service.replica_pids().values()] == [[], []]

    run(work())


@pytest.mark.parametrize("victim", ["source", "target"])
def test_a_death_on_the_way_costs_no_token(folder: Path, victim: str) -> None:
    async def work() -> None:
        async with started(folder) as service:
            alone = [await read(service, f"alone{i}", *kind) for i, kind in enumerate(kinds())]
            readers = [asyncio.create_task(read(service, f"r{i}", *kind)) for i, kind in enumerate(kinds())]
            while not all(has_drawn(service, f"r{i}") for i in range(4)):
                await asyncio.sleep(0.001)
            source = owner(service, "r0")
            assert source is not None
            for i in range(4):
                if owner(service, f"r{i}") == source:
                    service.move_request(f"r{i}", 1 - source, with_kv=True)
            dead = source if victim == "source" else 1 - source
            os.kill(service.replica_pids()[dead], signal.SIGKILL)
            assert await asyncio.gather(*readers) == alone
            while len(service.replica_pids()) < 2:
                await asyncio.sleep(0.01)
            await blocks_are_free(service)
            assert not any(memory_of(pid) for pid in service.replica_pids().values())

    run(work())
