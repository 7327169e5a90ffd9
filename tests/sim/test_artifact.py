"""Clusters by the artifact's rules: who hosts what, what is decided, and that equal steps change nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest

from peft_dist.sim.artifact import make_table, replica_options, triggers
from peft_dist.sim.experiment import SimulationResult, simulate
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.workload.arrivals import Arrival

PROFILE = CostProfile.load("paper-7b")
NAMES = tuple(f"m{index}" for index in range(8))


def load(seed: int, count: int, rate: float) -> list[Arrival]:
    """Most of it for the first adapters."""
    rng = random.Random(seed)
    times = sorted(rng.uniform(0, count / rate) for _ in range(count))
    return [
        Arrival(t, NAMES[min(int(rng.paretovariate(1.0)) - 1, 7)], rng.randrange(8, 300), rng.randrange(2, 200))
        for t in times
    ]


def run(arrivals: list[Arrival], **options: Any) -> SimulationResult:
    common = {"replicas": 4, "adapters": NAMES, "policy_profile": "artifact", "moves_kv": False}
    return simulate(arrivals, PROFILE, SimulationOptions(**{**common, **options}))


def test_replicas_have_slots_for_what_was_placed_and_the_rest_of_the_memory() -> None:
    options = SimulationOptions(replicas=4, policy_profile="artifact")
    specs = {name: PROFILE.adapter(name, 16) for name in NAMES}
    table = make_table(PROFILE, options, specs)
    own = [replica_options(PROFILE, options, table, index) for index in range(4)]
    assert sorted(one.max_loras or 0 for one in own) == [2, 3, 3, 3]
    total = PROFILE.num_blocks * PROFILE.block_bytes + PROFILE.max_loras * 16 * PROFILE.rank_bytes
    for one in own:
        assert one.num_blocks and one.max_loras
        left = total - one.num_blocks * PROFILE.block_bytes - one.max_loras * 16 * PROFILE.rank_bytes
        assert 0 <= left < PROFILE.block_bytes
        assert one.host_blocks == 2048, "16 GiB of 8 MiB each"


@pytest.mark.parametrize(("migration", "exec_type"), [("rr", "dlora"), ("dlora", "peft-artifact")])
def test_without_moves_requests_stay_with_the_hosts(migration: str, exec_type: str) -> None:
    result = run(load(1, 120, 10.0), migration=migration, exec_type=exec_type)
    assert not result.migration.moves and not result.migration.plans
    table = make_table(
        PROFILE,
        SimulationOptions(replicas=4, migration=migration),  # type: ignore[arg-type]
        {name: PROFILE.adapter(name, 16) for name in NAMES},
    )
    for number, replica in enumerate(result.replicas):
        assert replica.loads <= len(table.on(number))


def test_requests_move_between_pairs_and_are_computed_again() -> None:
    result = run(load(2, 500, 24.0))
    assert result.migration.moves.keys() == {"recompute"} and result.migration.moves["recompute"] > 16
    assert {name.partition("/")[2] for name in result.migration.plans} == {"period"}
    assert result.migration.plan_seconds == pytest.approx(0.2 * sum(result.migration.plans.values()))
    # A look every ten seconds, the first one with the first requests.
    assert sum(result.migration.plans.values()) in (int(result.seconds // 10), int(result.seconds // 10) + 1)
    assert "pairs of replicas" in result.source["exec_type"]


@pytest.mark.parametrize("migration", ["rr", "proactive", "dlora"])
def test_equal_steps_at_once_change_nothing(migration: str) -> None:
    asked = load(3, 250, 20.0)
    at_once, singly = (run(asked, migration=migration, advance=advance) for advance in (True, False))
    assert at_once.records == singly.records and at_once.replicas == singly.replicas
    assert at_once.migration == singly.migration and at_once.events < singly.events


def test_a_period_is_from_look_to_look() -> None:
    assert triggers(0.2).period + 0.2 == pytest.approx(10.0, abs=1e-3) and triggers(0.2).only_period
    assert triggers(50.0).period >= triggers(50.0).pause
