"""When a migration plan is worth making."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from peft_dist.core.errors import ConfigError
from peft_dist.placement.problem import Problem
from peft_dist.placement.types import ClusterView

Trigger = Literal["memory", "imbalance", "seats", "mixed", "starving", "period"]


@dataclass(frozen=True, slots=True)
class TriggerSettings:
    """Attributes:
    period: Seconds after which to plan in any case (dLoRA's artifact: 10).
    pause: Seconds for which nothing is planned after a plan: moves need time to show.
    kv_share: Share of its KV blocks from which a replica is full, while another is not.
    imbalance: Seconds by which the replica that ends last is behind the mean.
    imbalance_share: The same as a share of the mean; both must hold.
    starving: Seconds for which an adapter's oldest request has waited.
    only_period: Plan every ``period`` and for nothing else, as dLoRA's artifact, which then looks whether it must.
    """

    period: float = 10.0
    pause: float = 1.0
    kv_share: float = 0.9
    imbalance: float = 1.0
    imbalance_share: float = 0.25
    starving: float = 5.0
    only_period: bool = False

    def __post_init__(self) -> None:
        for name in ("period", "pause", "imbalance", "imbalance_share", "starving"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)} of the migration triggers must be 0 or more")
        if not 0 < self.kv_share <= 1:
            raise ConfigError(f"kv_share={self.kv_share} of the migration triggers must be above 0 and at most 1")


def trigger(
    view: ClusterView,
    waiting: Mapping[str, float],
    since_last: float,
    settings: TriggerSettings | None = None,
    chance: Trigger | None = None,
) -> Trigger | None:
    """Why to plan now, or None.

    Args:
        view: The cluster. Raises PlanError if it contradicts itself.
        waiting: By adapter, seconds for which its oldest request that has not started has waited.
        since_last: Seconds since the last plan; infinite before the first.
        settings: None takes the defaults.
        chance: Why moves may gain something that ``view`` does not show.
    """
    settings = settings or TriggerSettings()
    # One replica has nobody to share with, and no request needs none.
    if since_last < settings.pause or len(view.replicas) < 2 or not any(one.count for one in view.classes):
        return None
    if settings.only_period:
        return "period" if since_last >= settings.period else None
    if _is_full(view, settings.kv_share):
        return "memory"
    problem = Problem(view)
    times = problem.finishing_times(problem.stay)
    mean = sum(times) / len(times)
    if max(times) - mean >= max(settings.imbalance, settings.imbalance_share * mean):
        return "imbalance"
    if chance is not None:
        return chance
    if max(waiting.values(), default=0.0) >= settings.starving:
        return "starving"
    return "period" if since_last >= settings.period else None


def _is_full(view: ClusterView, share: float) -> bool:
    """Whether some replica is full, counting what waits there, and another that accepts is not."""
    demand = {replica.replica_id: 0 for replica in view.replicas}
    for one in view.classes:
        demand[one.source] += one.count * one.kv_blocks
    full = {
        replica.replica_id: max(demand[replica.replica_id], replica.kv_blocks - replica.free_kv_blocks)
        >= share * replica.kv_blocks
        for replica in view.replicas
        if replica.kv_blocks
    }
    return any(full.values()) and any(r.accepts and not full.get(r.replica_id, True) for r in view.replicas)
