"""Requests of an adapter gather where it can be merged, and moves do not undo that."""

from __future__ import annotations

import random
import statistics

import pytest

from peft_dist.placement.placer import MigrationKind
from peft_dist.sim.experiment import SimulationResult, simulate
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.workload.arrivals import Arrival

REPLICAS = 4


def run(migration: MigrationKind, policy_profile: str = "default") -> SimulationResult:
    """Ten requests a second for 20 s, half of them for one adapter of nine."""
    rng = random.Random(0)
    rows, now = [], 0.0
    for _ in range(200):
        now += rng.expovariate(10.0)
        adapter = "hot" if rng.random() < 0.5 else f"cold{rng.randrange(8)}"
        rows.append(Arrival(now, adapter, 100, rng.randrange(50, 250)))
    options = SimulationOptions(
        replicas=REPLICAS, migration=migration, policy_profile=policy_profile, token_times=False, plan="greedy"
    )
    return simulate(rows, CostProfile.load("paper-7b"), options)


def merged(result: SimulationResult) -> list[float]:
    """Share of each replica's steps, the largest last."""
    return sorted(replica.merged_steps / replica.steps for replica in result.replicas)


def mean(result: SimulationResult) -> float:
    return statistics.fmean((r.finished - r.sent) / r.output_tokens for r in result.records)


@pytest.mark.parametrize("migration", ["proactive", "dlora"])
def test_a_hot_adapter_has_replicas_for_itself(migration: MigrationKind) -> None:
    found = run(migration)
    assert merged(found)[-1] > 0.8 and merged(found)[0] < 0.5
    assert mean(found) < 0.9 * 27e-3, "an unmerged step a token is what nobody could do better than before"


def test_moves_cost_no_merging() -> None:
    with_moves, without = run("dlora"), run("proactive")
    assert sum(with_moves.migration.moves.values()) > 0
    assert mean(with_moves) < 1.05 * mean(without)


def test_with_the_artifacts_profile_no_replica_is_left_to_one_adapter() -> None:
    assert merged(run("proactive", "artifact"))[-1] < 0.9 < merged(run("proactive"))[-1]
