"""Replicas with a real model on the CPU that are killed and stopped: every stream is what its request is alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from peft_dist.core.config import EngineConfig
from peft_dist.worker.launcher import PlainLauncher
from scripts.demo_model import ensure_demo_model
from tests.e2e.disturbances import Disturbances
from tests.e2e.fault_scenario import Case, Outcome, ThisHost, make_cases, run_alone, serve_with_faults
from tests.tiny_models import make_model, random_adapter, target_modules

ROOT = Path(__file__).parents[2]
ROUNDS = 10


def disturb(spare: str | Path, case: Case) -> Disturbances:
    """Moves and loads; ``case`` is a greedy one of that adapter."""
    assert case.params.temperature == 0.0 and case.params.repetition_penalty == 1.0
    return Disturbances(Path(spare), case.prompt, case.expected[:8])


def smollm2() -> tuple[dict[str, str | Path], list[Case]]:
    """SmolLM2's adapters, and 200 requests of all of them and the base with what each is alone."""
    adapters, alone = smollm2_alone()
    # What their streams bring is of one test.
    return adapters, [Case(case.prompt, case.params, case.adapter, case.expected, case.text) for case in alone]


@cache
def smollm2_alone() -> tuple[dict[str, str | Path], list[Case]]:
    """It takes longer than some rounds."""
    folder = ROOT / "scripts" / "demo_adapters"
    adapters: dict[str, str | Path] = {name: folder / name for name in ("json", "sentiment", "sql", "style")}
    cases = make_cases(200, 40, 49_000, [None, *adapters])
    run_alone(ensure_demo_model(), adapters, cases, num_blocks=2048)
    return adapters, cases


def serve_smollm2(
    adapters: dict[str, str | Path], cases: list[Case], rounds: int, beside: Disturbances | None = None
) -> Outcome:
    """Two replicas, of which one is killed and one stopped in each round."""
    config = EngineConfig(model=str(ensure_demo_model()), device="cpu", num_threads=1, num_blocks=2048)
    host = ThisHost()
    faults = [(1500, host.take_away), (3500, host.stop)]
    return serve_with_faults(config, adapters, cases, faults, host, silence=5.0, rounds=rounds, beside=beside)


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
    host = ThisHost(PlainLauncher)
    faults = [(600, host.take_away), (1200, host.stop)]
    serve_with_faults(config, adapters, cases, faults, host)
    beside = disturb(adapters["a0"], next(case for case in cases if case.adapter == "a0"))
    serve_with_faults(config, adapters, cases, faults, host, beside=beside)
    assert beside.moves > 30 and beside.loads > 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_with_four_adapters_in_ten_rounds() -> None:
    adapters, cases = smollm2()
    print(serve_smollm2(adapters, cases, ROUNDS))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_smollm2_while_requests_move_and_adapters_come_and_go() -> None:
    adapters, cases = smollm2()
    beside = disturb(adapters["json"], next(case for case in cases if case.adapter == "json"))
    print(serve_smollm2(adapters, cases, 3, beside))
    print(f"{beside.moves} moves asked for, {beside.loads} adapters loaded, asked and unloaded")
    assert beside.moves > 300 and beside.loads > 3
