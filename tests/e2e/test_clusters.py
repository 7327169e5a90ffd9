"""Three replicas under load that lose a machine, whatever runs them; and what is Ray's alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from peft_dist.core.config import EngineConfig
from tests.e2e.fault_scenario import Machines, ThisHost, make_cases, run_alone, serve_with_faults
from tests.e2e.ray_nodes import ray_nodes
from tests.e2e.test_processes import ROOT
from tests.tiny_models import make_model, random_adapter, target_modules

WITHOUT_RAY = "ray is not installed: pip install 'peft-dist[ray]', or make test-ray"


@pytest.fixture(autouse=True)
def nodes_find_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


@contextmanager
def machines(kind: str) -> Iterator[Machines]:
    if kind == "accelerate":
        yield ThisHost()
    else:
        pytest.importorskip("ray", reason=WITHOUT_RAY)
        with ray_nodes(3) as nodes:
            yield nodes


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["accelerate", "ray"])
def test_three_replicas_lose_a_machine_under_load(kind: str, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    adapters: dict[str, str | Path] = {
        f"a{i}": random_adapter(model, tmp_path / f"a{i}", 4, 8.0, target_modules("llama"), seed=i) for i in range(2)
    }
    cases = make_cases(36, 200, 96, [None, *adapters])
    run_alone(tmp_path / "model", adapters, cases, num_blocks=512, num_threads=1)
    config = EngineConfig(model=str(tmp_path / "model"), device="cpu", num_threads=1, num_blocks=512)
    with machines(kind) as place:
        faults = [(1000, place.take_away)]
        outcome = serve_with_faults(config, adapters, cases, faults, place, num_replicas=3, rounds=2, again=True)
    print(f"{kind}: {outcome}")
