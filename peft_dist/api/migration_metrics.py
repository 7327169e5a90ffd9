"""What came of placing adapters and moving requests, as families of metrics named ``peft_dist:...``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

from peft_dist.orchestrator.observation import MOVE_SECONDS, MigrationView, MovesView

_WAYS = ("recompute", "kv")


def migration_families(view: MigrationView) -> Iterator[Any]:
    """Counters of a server with several replicas."""
    text = "Plans of which requests move, by who made them and why."
    plans = CounterMetricFamily("peft_dist:migration_plans", text, labels=["origin", "trigger"])
    for names, number in sorted(view.plans.items()):
        plans.add_metric(names, number)
    yield plans
    moves = CounterMetricFamily(
        "peft_dist:migration_moves", "Requests moved by plans, by the way taken.", labels=["way"]
    )
    for way in _WAYS:
        moves.add_metric([way], view.moves.get(way, 0))
    yield moves
    text = "Planned moves that were out of date when their turn came."
    yield CounterMetricFamily("peft_dist:migration_moves_dropped", text, view.num_dropped)
    text = "Seconds from a look at the requests to the last move of its plan."
    yield CounterMetricFamily("peft_dist:migration_plan_seconds", text, view.plan_seconds)
    yield CounterMetricFamily("peft_dist:placements", "Placements of the adapters that were made.", view.num_placements)
    yield from _live_families(view.live)


def _live_families(view: MovesView) -> Iterator[Any]:
    text = "Moves of running requests, by why, how and with what end."
    ends = CounterMetricFamily("peft_dist:live_moves", text, labels=["cause", "way", "outcome"])
    for names, number in sorted(view.ends.items()):
        ends.add_metric(names, number)
    yield ends
    text = "Bytes of KV of the requests that moved with it, by the memory in which it lay on the way."
    sizes = CounterMetricFamily("peft_dist:live_move_kv_bytes", text, labels=["memory"])
    for memory in ("device", "host"):
        sizes.add_metric([memory], view.num_bytes.get(memory, 0))
    yield sizes
    text = "Seconds until a request that moved with its KV ran elsewhere."
    bounds = [*map(str, MOVE_SECONDS), "+Inf"]
    buckets = list(zip(bounds, accumulate(view.seconds), strict=True))
    yield HistogramMetricFamily("peft_dist:live_move_seconds", text, buckets, view.sum_seconds)
