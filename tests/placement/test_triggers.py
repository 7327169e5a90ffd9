"""When to plan."""

from __future__ import annotations

import math

import msgspec
import pytest

from peft_dist.core.cost_model import CostModel, CostPrior
from peft_dist.core.errors import ConfigError
from peft_dist.core.step_costs import StepCosts
from peft_dist.placement.costs import ReplicaCosts
from peft_dist.placement.problem import Problem
from peft_dist.placement.triggers import TriggerSettings, trigger
from peft_dist.placement.types import AdapterLoad, ClusterView, PlanError, ReplicaLoad, RequestClass

COSTS = ReplicaCosts(decode_token=0.01)
IDLE = [ReplicaLoad(i, COSTS, 100, 100, 10, device=["a"]) for i in range(3)]


def cluster(*classes: RequestClass, replicas: list[ReplicaLoad] = IDLE) -> ClusterView:
    return ClusterView(replicas, [AdapterLoad("a", 1)], list(classes))


LEVEL = cluster(*(RequestClass(i, "a", 1, 0, 100) for i in range(3)))


def test_the_period_and_the_pause() -> None:
    assert trigger(LEVEL, {}, 9.9) is None
    assert trigger(LEVEL, {}, 10.0) == trigger(LEVEL, {}, math.inf) == "period"
    uneven = cluster(RequestClass(0, "a", 3, 0, 100))
    assert trigger(uneven, {}, 0.9) is None and trigger(uneven, {}, 1.0) == "imbalance"


def test_imbalance_needs_seconds_and_a_share() -> None:
    small = cluster(RequestClass(0, "a", 1, 0, 100))
    assert trigger(small, {}, 5.0) is None
    large = cluster(*(RequestClass(i, "a", 100 + 20 * (i == 0), 0, 100) for i in range(3)))
    assert trigger(large, {}, 5.0) is None


def test_memory_needs_somewhere_to_go() -> None:
    waiting = RequestClass(0, "a", 9, 0, 1, kv_blocks=10)
    assert trigger(cluster(waiting), {}, 5.0) == "memory"
    assert trigger(cluster(msgspec.structs.replace(waiting, count=8)), {}, 5.0) is None
    everywhere = cluster(*(msgspec.structs.replace(waiting, source=i) for i in range(3)))
    assert trigger(everywhere, {}, 5.0) is None
    shut = [IDLE[0], *(msgspec.structs.replace(r, accepts=False) for r in IDLE[1:])]
    assert trigger(cluster(waiting, replicas=shut), {}, 5.0) is None
    used = [msgspec.structs.replace(IDLE[0], free_kv_blocks=5), *IDLE[1:]]
    assert trigger(cluster(RequestClass(0, "a", 1, 0, 1), replicas=used), {}, 5.0) == "memory"


def test_starving() -> None:
    assert trigger(LEVEL, {"a": 4.9}, 5.0) is None and trigger(LEVEL, {"a": 5.0}, 5.0) == "starving"


def test_nobody_to_share_with_and_nothing_to_do() -> None:
    assert trigger(cluster(), {"a": 99.0}, math.inf) is None
    assert trigger(cluster(RequestClass(0, "a", 99, 0, 100), replicas=IDLE[:1]), {"a": 99.0}, math.inf) is None


@pytest.mark.parametrize("change", [{"period": -1.0}, {"kv_share": 0.0}, {"starving": math.nan}])
def test_settings_are_checked(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(change))}=.* of the migration triggers must be"):
        TriggerSettings(**change)


@pytest.mark.parametrize(
    ("view", "error"),
    [
        (cluster(replicas=[IDLE[0], IDLE[0]]), "replica 0 is in the view twice"),
        (cluster(RequestClass(7, "a", 1, 0, 1)), "request class 0 is on replica 7, which is not in the view"),
        (cluster(RequestClass(0, "x", 1, 0, 1)), "request class 0 uses adapter 'x', whose size the view does not give"),
        (cluster(RequestClass(0, "a", -1, 0, 1)), "request class 0: count=-1 must be finite and zero or more"),
        (cluster(RequestClass(0, "a", 1, math.nan, 1)), "request class 0: prefill_tokens=nan must be finite"),
        (cluster(replicas=[ReplicaLoad(0, COSTS, 5, 6, 1)]), "replica 0: free_kv_blocks=6 of kv_blocks=5"),
        (cluster(replicas=[ReplicaLoad(0, COSTS, 5, 5, 1, pinned=["x"])]), "replica 0: pinned names adapter 'x'"),
        (
            cluster(replicas=[ReplicaLoad(0, ReplicaCosts(load=(0.0, -1.0)), 5, 5, 1)]),
            r"replica 0: costs.load=-1.0 must be finite and zero or more",
        ),
        (ClusterView([], [AdapterLoad("", 1)], []), 'the adapter "" stands for the base model'),
        (ClusterView([], [AdapterLoad("a", 1), AdapterLoad("a", 2)], []), "adapter 'a' is in the view twice"),
    ],
)
def test_views_that_contradict_themselves_are_named(view: ClusterView, error: str) -> None:
    with pytest.raises(PlanError, match=error):
        view.check()


def test_costs_of_a_cost_model() -> None:
    prior = CostPrior(step=8e-3, decode_sequence=1e-4, prefill_token=1e-5, lora_step=0, lora_token=0, adapter=0)
    reported = StepCosts.of(CostModel(prior, fixed=True))
    costs = ReplicaCosts.of(reported, 15, {"a": (5, 8)}, block_size=8)
    assert costs.decode_token == pytest.approx((8e-3 + 20 * 1e-4) / 20)
    assert costs.prefill_token == pytest.approx(1e-5) and costs.swap_block == pytest.approx(8e-5)
    assert costs.load == pytest.approx((1e-3, 1e-10)) and costs.fetch == reported.fetch
    # KV that cannot be moved is computed again, whatever it costs.
    view = cluster(RequestClass(0, "a", 1, 0, 10, context_tokens=10**6), replicas=[IDLE[0], IDLE[1]])
    ways = [
        Problem(_charging(view, one)).way(0, 1) for one in (costs, ReplicaCosts.of(reported, 1, {}, 8, (1e-3, 0.0)))
    ]
    assert ways == ["recompute", "kv"]


def _charging(view: ClusterView, costs: ReplicaCosts) -> ClusterView:
    replicas = [msgspec.structs.replace(replica, costs=costs) for replica in view.replicas]
    return msgspec.structs.replace(view, replicas=replicas)
