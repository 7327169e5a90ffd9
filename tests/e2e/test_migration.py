"""Two replicas with a real model on the CPU: where adapters go, and requests that move when the load tips."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from peft_dist.core.config import EngineConfig
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.service import EngineService
from peft_dist.placement.placer import MigrationKind
from peft_dist.placement.triggers import TriggerSettings
from peft_dist.worker.launcher import PlainLauncher
from tests.e2e.fault_scenario import make_cases, run_alone
from tests.e2e.test_replicas import until
from tests.tiny_models import make_model, random_adapter, target_modules

NUM_ADAPTERS, NUM_TOKENS = 4, 230
# Steps of a tiny model are short: so is all else.
TRIGGERS = TriggerSettings(period=0.2, pause=0.1, imbalance=0.05)


def make_adapters(folder: Path) -> dict[str, str | Path]:
    model = make_model("llama", folder / "model")
    return {
        f"a{i}": random_adapter(model, folder / f"a{i}", 4, 8.0, target_modules("llama"), seed=i)
        for i in range(NUM_ADAPTERS)
    }


@asynccontextmanager
async def started(folder: Path, adapters: dict[str, str | Path], kind: MigrationKind) -> AsyncIterator[EngineService]:
    config = EngineConfig(model=str(folder / "model"), device="cpu", num_threads=1, num_blocks=512)
    launcher = PlainLauncher(config, log_level="error", num_replicas=2)
    # Half of the requests that come: the others wait for a seat, as far as the orchestrator knows.
    options = OrchestratorOptions(max_num_seqs=8, max_queue=64, seed=1, migration=kind, triggers=TRIGGERS)
    service = EngineService(launcher, options, num_replicas=2, stop_grace=5.0)
    try:
        await service.start()
        for name, path in adapters.items():
            await service.load_adapter(name, str(path))
        yield service
    finally:
        await service.stop()


def on_device(service: EngineService) -> dict[int, set[str]]:
    """Contents on each replica's device, as it reported."""
    return {view.replica_id: set(view.stats.resident_adapters) for view in service.replicas()}


def placed(service: EngineService) -> dict[int, set[str]]:
    """Contents that are placed on each replica."""
    placement = service._core.migration.hosting.placement
    hosts = placement.hosts if placement is not None else {}
    return {i: {content for content, replicas in hosts.items() if i in replicas} for i in (0, 1)}


async def read(service: EngineService, request_id: str, adapter: str) -> None:
    """A stream to its end."""
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    async for _, progress in service.generate(request_id, [5, 6, 7], params, adapter):
        assert progress.error is None


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_requests_move_off_a_crowded_replica_and_nobody_notices(tmp_path: Path) -> None:
    adapters = make_adapters(tmp_path)
    cases = make_cases(16, NUM_TOKENS, 96, [None, *adapters])
    run_alone(tmp_path / "model", adapters, cases, num_blocks=512, num_threads=1)

    async def work() -> None:
        async with started(tmp_path, adapters, "dlora") as service:
            await service.drain_replica(1)
            reading = [asyncio.create_task(case.run(service, f"r{i}")) for i, case in enumerate(cases)]
            await until(lambda: all(len(case.tokens) > 3 for case in cases))
            service.resume_replica(1)
            await asyncio.gather(*reading)
            for case in cases:
                case.check()
            view = service.migration()
            assert view is not None and view.moves["recompute"] >= 4
            # Whoever made the first plan: later ones are asked of a warm solver.
            assert sum(view.plans.values()) >= 1 and not any(origin == "failed" for origin, _ in view.plans)

    asyncio.run(work())


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_adapters_are_where_they_are_placed_before_anybody_asks(tmp_path: Path) -> None:
    adapters = make_adapters(tmp_path)

    async def work() -> None:
        async with started(tmp_path, adapters, "rr") as service:
            await until(lambda: len(placed(service)[0] | placed(service)[1]) == NUM_ADAPTERS)
            assert sum(len(contents) for contents in placed(service).values()) == NUM_ADAPTERS + 2 - 1
            await until(lambda: on_device(service) == placed(service))
            for turn in range(3):
                names = enumerate([*adapters] * 4)
                await asyncio.gather(*(read(service, f"r{turn}-{i}", name) for i, name in names))
            # Had a request gone elsewhere, its adapter would have followed.
            assert on_device(service) == placed(service)
            view = service.migration()
            assert view is not None and not view.plans and not view.moves

    asyncio.run(work())
