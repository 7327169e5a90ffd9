"""Plans against every plan there is, and the promises that all of them keep."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter

import pytest

from peft_dist.placement.costs import ReplicaCosts
from peft_dist.placement.improvement import improve
from peft_dist.placement.planning import greedy_plan, plans
from peft_dist.placement.problem import Problem
from peft_dist.placement.program import Program
from peft_dist.placement.solving import solve
from peft_dist.placement.types import AdapterLoad, AdapterStep, ClusterView, MigrationPlan, ReplicaLoad, RequestClass
from tests.placement.cases import arrangement_of, best_objective, objective, random_view, seconds_of

NUM_CASES = 240
BATCH = 40


def exact(program: Program, seconds: float, gap: float) -> tuple[list[float] | None, str]:
    return solve(program, seconds, 0.0)


def last_plan(view: ClusterView, max_flows: int = 600, seconds: float = 30.0) -> MigrationPlan:
    end = time.monotonic() + seconds
    *_, last = plans(view, exact, lambda: end - time.monotonic(), max_flows)
    return last


def keeps_its_promises(view: ClusterView, plan: MigrationPlan) -> None:
    """What a plan says of itself is so, by the rules of ``cases``; nothing is lost and everything fits."""
    times = seconds_of(view, arrangement_of(view, plan))
    assert times is not None
    assert max(*times, view.floor) == pytest.approx(plan.after, abs=1e-7)
    assert objective(times, view.floor) == pytest.approx(plan.objective, abs=1e-7)
    stay = [tuple(one.count * (one.source == r.replica_id) for r in view.replicas) for one in view.classes]
    assert max(*(seconds_of(view, stay) or []), view.floor) == pytest.approx(plan.before, abs=1e-7)
    assert plan.after <= plan.greedy + 1e-7 and plan.greedy <= plan.before + 1e-7
    assert (plan.origin == "stay") == (not plan.moves)


@pytest.mark.parametrize("first", range(0, NUM_CASES, BATCH))
def test_the_solver_finds_the_best_plan(first: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(first, first + BATCH):
        view = random_view(seed)
        plan = last_plan(view)
        keeps_its_promises(view, plan)
        best = best_objective(view, plan.greedy)
        assert plan.objective == pytest.approx(best, abs=1e-6), f"seed {seed}: {plan}"
        seen[plan.origin] += 1
        if plan.origin == "solver":
            assert plan.objective < plan.greedy_objective
    # Cases of every kind, or nothing was tested.
    assert seen["solver"] and seen["greedy"] and seen["stay"]


def test_greedy_plans_keep_their_promises_in_larger_clusters() -> None:
    for seed in range(60):
        view = random_view(seed, replicas=6, classes=30, count=9, adapters=8)
        keeps_its_promises(view, greedy_plan(view))


def test_a_greedy_plan_that_is_cut_short_keeps_them_too() -> None:
    view = next(v for v in map(random_view, range(100)) if len(greedy_plan(v).moves) > 2)
    found = []
    for num_steps in range(6):
        left = iter([1.0] * num_steps)
        plan = greedy_plan(view, seconds_left=lambda left=left: next(left, 0.0))  # type: ignore[misc]
        keeps_its_promises(view, plan)
        found.append(plan.after)
    assert found[0] == greedy_plan(view).before and found == sorted(found, reverse=True) and found[0] > found[-1]


@pytest.mark.parametrize("max_flows", [12, 40, 600])
def test_rounds_over_groups_never_make_it_worse(max_flows: int) -> None:
    better = 0
    for seed in range(12):
        view = random_view(seed, replicas=6, classes=14, count=5, adapters=6)
        end = time.monotonic() + 0.5
        found = list(plans(view, exact, lambda end=end: end - time.monotonic(), max_flows))  # type: ignore[misc]
        for plan in found:
            keeps_its_promises(view, plan)
        values = [plan.objective for plan in found]
        assert all(b <= a + 1e-9 for a, b in itertools.pairwise(values))
        better += found[-1].objective < found[0].objective - 1e-6
    assert better


@pytest.mark.parametrize("answer", [None, "wrong", "fractions"])
def test_a_solver_that_fails_leaves_the_greedy_plan(answer: str | None) -> None:
    def broken(program: Program, seconds: float, gap: float) -> tuple[list[float] | None, str]:
        if answer is None:
            return None, "no solution (status 4)"
        return [0.0 if answer == "wrong" else 0.4] * len(program.cost), "optimal"

    view = next(v for v in map(random_view, range(100)) if greedy_plan(v).origin == "greedy")
    *_, plan = plans(view, broken, lambda: 1.0)
    expected = greedy_plan(view)
    assert (plan.moves, plan.origin, plan.objective) == (expected.moves, "greedy", expected.objective)
    assert ("no solution" if answer is None else "refused: class") in plan.status


def test_no_solver_is_asked_for_less_than_no_time() -> None:
    """HiGHS takes a negative limit for none."""
    view = random_view(1, replicas=6, classes=14, count=5, adapters=6)
    later = iter([0.05, 0.02, -0.01])
    left, asked = [0.1], []

    def slow(program: Program, seconds: float, gap: float) -> tuple[list[float] | None, str]:
        asked.append(seconds)
        left[0] = next(later)
        return None, "out of time"

    list(plans(view, slow, lambda: left[0], 12))
    assert len(asked) == 3 and min(asked) > 0


def test_time_that_is_over_leaves_the_greedy_plan() -> None:
    view = random_view(3)
    assert [plan.status for plan in plans(view, exact, lambda: 0.0)] == ["not asked", "no time"]


def two_replicas(*classes: RequestClass, **changes: object) -> ClusterView:
    costs = ReplicaCosts(1e-3, 1e-2, (0.5, 0.0), (1.0, 0.0), (0.1, 0.0), 0.0, 0.0)
    idle = {"costs": costs, "kv_blocks": 100, "free_kv_blocks": 100, "adapter_bytes": 10, "device": ["a"]} | changes
    return ClusterView(
        [ReplicaLoad(0, costs, 100, 0, 10, device=["a", "b"], host=["a", "b"]), ReplicaLoad(1, **idle)],  # type: ignore[arg-type]
        [AdapterLoad("a", 1), AdapterLoad("b", 1), AdapterLoad("c", 1)],
        list(classes),
    )


def test_it_weighs_what_remains_and_not_how_many() -> None:
    view = two_replicas(RequestClass(0, "a", 1, 0, 300), RequestClass(0, "a", 3, 0, 100))
    assert last_plan(view).after == pytest.approx(3.0)


@pytest.mark.parametrize(("context", "way"), [(50.0, "recompute"), (1000.0, "kv")])
def test_it_moves_in_the_cheaper_way(context: float, way: str) -> None:
    view = two_replicas(RequestClass(0, "a", 2, 0, 500, context_tokens=context, kv_blocks=1))
    (move,) = last_plan(view).moves
    assert (move.count, move.way) == (1, way)
    assert last_plan(view).after == pytest.approx(5.0 + min(context * 1e-3, 0.1))


def test_an_adapter_is_loaded_only_where_that_pays() -> None:
    short = two_replicas(RequestClass(0, "b", 4, 0, 30))
    assert last_plan(short).origin == "stay"
    long = two_replicas(RequestClass(0, "b", 4, 0, 300))
    plan = last_plan(long)
    assert plan.after == pytest.approx(2 * 3.0 + 1.5)
    assert plan.steps == [AdapterStep("copy", 1, "b", source=0)]
    on_host = last_plan(two_replicas(RequestClass(0, "b", 4, 0, 300), host=["b"]))
    assert on_host.after == pytest.approx(2 * 3.0 + 0.5)
    assert on_host.steps == [AdapterStep("load", 1, "b")]


def test_a_full_replica_gets_nothing_that_needs_room() -> None:
    waiting = RequestClass(0, "a", 10, 100, 100, kv_blocks=10)
    assert sum(move.count for move in last_plan(two_replicas(waiting, free_kv_blocks=29)).moves) == 2
    assert not last_plan(two_replicas(waiting, free_kv_blocks=9)).moves
    assert not last_plan(two_replicas(waiting, accepts=False)).moves


def test_adapters_compete_for_room() -> None:
    classes = [RequestClass(0, name, 2, 0, 300) for name in ("b", "c")]
    one = last_plan(two_replicas(*classes, adapter_bytes=1, device=[]))
    assert len({move.adapter for move in one.moves}) == 1
    pinned = last_plan(two_replicas(*classes, adapter_bytes=1, pinned=["a"]))
    assert not pinned.moves


def test_nothing_moves_for_nothing() -> None:
    level = two_replicas(RequestClass(0, "a", 3, 0, 100), RequestClass(1, "a", 3, 0, 100))
    assert last_plan(level).origin == "stay"
    empty = ClusterView([], [], [])
    assert greedy_plan(empty).moves == [] and math.isfinite(greedy_plan(empty).after)
    assert last_plan(ClusterView(level.replicas, level.adapters, [])).moves == []


def test_a_round_that_helps_its_group_alone_is_no_worse_plan() -> None:
    """Of two replicas that end last one is relieved, at the price of more work: the makespan stays, the mean grows."""
    costs = ReplicaCosts(0.0, 1.0, (0.0, 0.0), (0.0, 0.0), (0.0, 0.0), 0.0, move=1.0)
    replicas = [ReplicaLoad(i, costs, 0, 0, 0, accepts=i == 2) for i in range(3)]
    classes = [RequestClass(0, "", 2, 0, 4), RequestClass(1, "", 1, 0, 8)]
    view = ClusterView(replicas, [], classes)
    problem = Problem(view)
    (first, *_) = improve(problem, problem.stay, exact, lambda: 1.0, max_flows=4)
    assert first.flows == [{0: 1, 2: 1}, {1: 1}]
    assert [(plan.origin, plan.moves) for plan in plans(view, exact, lambda: 1.0, 4)][-1] == ("stay", [])
