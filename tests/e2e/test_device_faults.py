"""Replicas whose device runs out of memory in a step, or fails for good: nobody's answer is another one for it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import torch

from peft_dist.core.config import EngineConfig
from peft_dist.core.restarts import RestartPolicy
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.service import EngineService
from peft_dist.worker.launcher import AccelerateLauncher, PlainLauncher
from tests.e2e.fault_scenario import Case, ThisHost, make_cases, run_alone, serve_with_faults
from tests.e2e.test_processes import ROOT
from tests.e2e.test_replicas import until
from tests.e2e.test_serve import children
from tests.tiny_models import make_model, random_adapter, target_modules
from tests.worker.failing_device import DEAD, OUT_OF_MEMORY

FACTORY = "tests.worker.failing_device:build"
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def workers_find_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


class Launcher(PlainLauncher):
    """Of replicas with a device that can be told to fail."""

    def __init__(self, engine: EngineConfig, **options: object) -> None:
        super().__init__(engine, replica_factory=FACTORY, **options)  # type: ignore[arg-type]


class SplitLauncher(AccelerateLauncher):
    """The same, of several ranks, whose devices are told one by one."""

    def __init__(self, engine: EngineConfig, **options: object) -> None:
        super().__init__(engine, replica_factory=FACTORY, **options)  # type: ignore[arg-type]


def make_adapters(folder: Path) -> dict[str, str | Path]:
    """Beside a model, in ``folder / "model"``."""
    model = make_model("llama", folder / "model")
    return {f"a{i}": random_adapter(model, folder / f"a{i}", 4, 8.0, target_modules("llama"), seed=i) for i in range(2)}


async def run_out_of_memory(service: EngineService, replica_id: int) -> None:
    os.kill(service.replica_pids()[replica_id], OUT_OF_MEMORY)


async def die(service: EngineService, replica_id: int) -> None:
    os.kill(service.replica_pids()[replica_id], DEAD)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=[pytest.mark.gpu, needs_a_gpu])]
)
def test_a_step_that_fails_ends_its_replica_and_no_stream(device: str, tmp_path: Path) -> None:
    adapters = make_adapters(tmp_path)
    cases = make_cases(24, 200, 96, [None, *adapters])
    options = {"dtype": "float32", "num_blocks": 512, "num_threads": 1, "enforce_eager": True}
    run_alone(tmp_path / "model", adapters, cases, device=device, **options)
    config = EngineConfig(model=str(tmp_path / "model"), device=device, **options)
    faults = [(600, run_out_of_memory), (1200, die)]
    serve_with_faults(config, adapters, cases, faults, ThisHost(Launcher))


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_a_gpu])])
def test_a_device_that_failed_is_noticed_by_who_loads_an_adapter(device: str, tmp_path: Path) -> None:
    """Where every request has to wait for its adapter, no step would ever tell."""
    adapters = make_adapters(tmp_path)
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    before, after = (Case([5, 6, 7, number], greedy, name) for number, name in enumerate(adapters))
    options = {"dtype": "float32", "num_blocks": 64, "max_loras": 1, "num_threads": 1, "enforce_eager": True}
    run_alone(tmp_path / "model", adapters, [before, after], device=device, **options)

    async def work() -> None:
        config = EngineConfig(model=str(tmp_path / "model"), device=device, **options)
        restarts = OrchestratorOptions(max_num_seqs=4, seed=1, restart=RestartPolicy(first=0.05))
        service = EngineService(Launcher(config, log_level="critical"), restarts, stop_grace=5.0)
        try:
            await service.start()
            for name, path in adapters.items():
                await service.load_adapter(name, str(path))
            await before.run(service, "before")
            before.check()
            pids = service.replica_pids()
            await die(service, 0)
            await after.run(service, "after")
            after.check()
            await until(lambda: service.replica_pids().get(0, pids[0]) != pids[0])
            assert service.replicas()[0].num_restarts == 1
        finally:
            await service.stop()

    asyncio.run(work())


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_whose_device_fails_takes_its_replica_and_no_stream(rank: int, tmp_path: Path) -> None:
    adapters = make_adapters(tmp_path)
    cases = make_cases(8, 100, 96, [None, *adapters])
    options = {"dtype": "float32", "num_blocks": 128, "num_threads": 1}
    run_alone(tmp_path / "model", adapters, cases, **options)
    config = EngineConfig(model=str(tmp_path / "model"), device="cpu", tensor_parallel_size=2, **options)

    async def break_rank(service: EngineService, replica_id: int) -> None:
        [launcher] = [each for each in children(os.getpid()) if service.replica_pids()[replica_id] in children(each)]
        ranks = {int(environment_of(each)["RANK"]): each for each in children(launcher)}
        os.kill(ranks[rank], DEAD)

    serve_with_faults(config, adapters, cases, [(200, break_rank)], ThisHost(SplitLauncher), num_replicas=1)


def environment_of(process: int) -> dict[str, str]:
    parts = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return dict(part.decode().split("=", 1) for part in parts if b"=" in part)
