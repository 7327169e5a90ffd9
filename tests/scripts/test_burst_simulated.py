"""What a GPU did with 512 requests at once is what the simulator says it does, by a profile of single steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.burst_simulated import bursts

from peft_dist.sim.profile import CostProfile
from tests.thorough import some_of

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize("adapters", some_of(["distinct", "none", "same", "zipf"], 4))
@pytest.mark.parametrize(("result", "profile"), [("gpu", "h100-8b"), ("gpu_h200", "h200-8b")])
def test_the_same_steps_in_about_the_time(result: str, profile: str, adapters: str) -> None:
    lines = json.loads((RESULTS / f"{result}.json").read_text())["figures"]["measurements"]
    [found] = bursts([line for line in lines if line.get("adapters") == adapters], CostProfile.load(profile))
    assert found.simulated_steps == pytest.approx(found.steps, rel=0.01)
    assert found.simulated_seconds == pytest.approx(found.seconds, rel=0.15)
