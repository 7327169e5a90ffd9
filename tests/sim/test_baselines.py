"""Baselines batch, switch and share as they are said to, and cost what their constants make."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peft_dist.core.errors import ConfigError
from peft_dist.sim.baselines import BUS, GROUPED_RATIO, RESIDENT
from peft_dist.sim.experiment import SimulationResult, simulate
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.workload.arrivals import Arrival

PROFILE = CostProfile.load("paper-7b")
STEP, SWITCH = PROFILE.costs.step, PROFILE.costs.merge[0]
MODEL = PROFILE.weight_bytes / BUS
RESULTS = Path(__file__).parents[2] / "docs" / "results"


def run(exec_type: str, *arrivals: tuple[float, str, int], **options: Any) -> SimulationResult:
    """Requests of (seconds, adapter, output tokens), each with a prompt of 8 tokens."""
    rows = [Arrival(time, adapter, 8, tokens) for time, adapter, tokens in arrivals]
    return simulate(rows, PROFILE, SimulationOptions(exec_type=exec_type, **options))


@pytest.mark.parametrize("kind", ["vllm", "peft"])
def test_the_artifacts_batch_is_the_head_of_the_queue(kind: str) -> None:
    """Of a, b, a the third waits for the second, though it could run with the first."""
    known = [(0.0, "a", 1), (0.0, "b", 1)]
    asked = [*known, (9.0, "a", 30), (9.0 + 1e-6, "b", 30), (9.0 + 2e-6, "a", 30)]

    def firsts(form: str) -> list[float]:
        return [record.first_token or 0.0 for record in run(form, *asked).records[2:]]

    first, second, third = firsts(f"{kind}-artifact")
    assert first + 29 * STEP < second and second + 29 * STEP < third
    first, second, third = firsts(kind)
    assert third < second and third - first < 3 * STEP


def test_the_artifacts_peft_merges_and_unmerges_in_every_step() -> None:
    [record] = run("peft-artifact", (0.0, "a", 50)).records
    assert record.finished - (record.first_token or 0.0) == pytest.approx(49 * (STEP + 2 * SWITCH), rel=1e-3)
    fair = run("peft", (0.0, "a", 50), (3.0, "b", 50), (6.0, "b", 50))
    assert fair.replicas[0].switches == 2 and fair.switch_seconds == pytest.approx(4 * SWITCH)
    assert fair.records[2].e2e == pytest.approx(50 * STEP, rel=0.03)


@pytest.mark.parametrize(("form", "copies"), [("vllm-artifact", 2), ("vllm", 1)])
def test_a_model_that_is_not_on_the_device_is_copied_in(form: str, copies: int) -> None:
    """Four models are there from the start. Of five in turn the first four are there in the first turn alone."""
    resident = RESIDENT[True]
    for number, misses in ((resident, 0), (resident + 1, 2 * (resident + 1) + 1)):
        turns = [(8.0 * turn, f"m{turn % number}", 5) for turn in range(3 * number)]
        assert run(form, *turns).switch_seconds == pytest.approx(misses * copies * MODEL)
    later = run(form, (0.0, "b", 5), adapters=tuple("qrstb"))
    assert later.switch_seconds == pytest.approx(copies * MODEL)


def test_models_leave_little_memory_to_kv() -> None:
    """4 models and what they leave are 90 % of 80 GB."""
    result = run("vllm", (0.0, "a", 5))
    assert result.records[0].error is None
    from peft_dist.sim.exec_types import find

    hardware = find("vllm").hardware(PROFILE, SimulationOptions(exec_type="vllm"), 0)
    kept = hardware.num_blocks * hardware.block_bytes
    assert kept + 4 * PROFILE.weight_bytes == pytest.approx(0.9 * 80e9, rel=1e-3)
    with pytest.raises(ConfigError, match="leave no room for KV"):
        find("vllm").hardware(replace(PROFILE, num_blocks=3000), SimulationOptions(exec_type="vllm"), 0)
    with pytest.raises(ConfigError, match="does not tell weight_bytes"):
        find("vllm").hardware(replace(PROFILE, weight_bytes=0), SimulationOptions(exec_type="vllm"), 0)


def test_each_model_has_one_replica() -> None:
    """Four models of two replicas: the first two on one, the others on the other, however long they queue there."""
    asked = [(0.01 * index, f"m{index % 2}", 40) for index in range(12)] + [(1.0, "m3", 5)]
    names = tuple(f"m{index}" for index in range(4))
    result = run("vllm-artifact", *asked, replicas=2, adapters=names)
    assert [replica.requests for replica in result.replicas] == [12, 1]
    assert [record.index for record in result.records] == list(range(13))
    alone = run("vllm-artifact", *asked[:12], adapters=names[:2])
    assert [record.finished for record in result.records[:12]] == [record.finished for record in alone.records]


def test_fair_models_are_spread_where_a_trace_asks_for_the_first_ones_alone() -> None:
    """Two of eight are asked for: the artifact has both on the first of four replicas."""
    asked = [(0.01 * index, f"m{index % 2}", 40) for index in range(12)]
    names = tuple(f"m{index}" for index in range(8))
    for form, wanted in (("vllm-artifact", [12, 0, 0, 0]), ("vllm", [6, 6, 0, 0])):
        result = run(form, *asked, replicas=4, adapters=names)
        assert [replica.requests for replica in result.replicas] == wanted


def test_grouped_kernels_cost_what_ours_were_measured_to() -> None:
    measured = json.loads((RESULTS / "gpu_peft.json").read_text())["figures"]["measurements"]
    steps = {
        (row["mode"], row["adapters"]): row["step_ms"]
        for row in measured
        if tuple(map(row.get, ("engine", "shape", "part", "batch"))) == ("ours", "8b", "decode", 32)
    }
    assert pytest.approx(steps["lora", "distinct"] / steps["base", "none"], abs=0.005) == GROUPED_RATIO
    [record] = run("grouped", (0.0, "a", 50), policy="fcfs").records
    assert record.finished - (record.first_token or 0.0) == pytest.approx(49 * STEP * GROUPED_RATIO, rel=1e-3)
