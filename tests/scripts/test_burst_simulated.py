"""What a GPU did with 512 requests at once is what the simulator says it does, by a profile of single steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.burst_simulated import bursts

from peft_dist.sim.profile import CostProfile

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize(("result", "profile"), [("gpu", "h100-8b"), ("gpu_h200", "h200-8b")])
def test_the_same_steps_in_about_the_time(result: str, profile: str) -> None:
    lines = json.loads((RESULTS / f"{result}.json").read_text())["figures"]["measurements"]
    found = list(bursts(lines, CostProfile.load(profile)))
    assert [one.adapters for one in found] == ["none", "same", "zipf", "distinct"]
    for one in found:
        assert one.simulated_steps == pytest.approx(one.steps, rel=0.01)
        assert one.simulated_seconds == pytest.approx(one.seconds, rel=0.15)
