"""Keeps a placement while it is good enough: adapters are not moved for every flutter of the rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from peft_dist.core.errors import ConfigError
from peft_dist.placement.adapter_steps import steps_to
from peft_dist.placement.placing import Hosts, Placement, place, place_round_robin, shares, tolerance
from peft_dist.placement.problem import Problem
from peft_dist.placement.types import AdapterStep, ClusterView

MigrationKind = Literal["rr", "proactive", "dlora"]
KINDS: tuple[MigrationKind, ...] = get_args(MigrationKind)


@dataclass(frozen=True, slots=True)
class PlacerSettings:
    """Attributes:
    drift: Part of the work that must have gone from some adapters to others before a new placement is looked for.
    gain: Factor by which a new placement must raise the least burst tolerance.
    """

    drift: float = 0.1
    gain: float = 1.1

    def __post_init__(self) -> None:
        if not 0 <= self.drift <= 1:
            raise ConfigError(f"drift={self.drift} of the placement must be between 0 and 1")
        if not self.gain >= 1:
            raise ConfigError(f"gain={self.gain} of the placement must be at least 1")


class Placer:
    """The placement of one kind: "rr" is round robin and never follows the rates, "proactive" and "dlora" do.

    What else the kinds differ in is for others to ask: ``migrates`` (requests move) and ``swaps_on_dispatch`` (a
    request may be sent to a replica without its adapter).
    """

    def __init__(self, kind: MigrationKind = "dlora", settings: PlacerSettings | None = None) -> None:
        if kind not in KINDS:
            raise ConfigError(f"migration={kind!r} is unknown: use {', '.join(KINDS)}")
        self.kind = kind
        self.settings = settings or PlacerSettings()
        self.placement: Placement | None = None
        self._shares: dict[str, float] = {}

    @property
    def migrates(self) -> bool:
        return self.kind == "dlora"

    @property
    def swaps_on_dispatch(self) -> bool:
        return self.kind != "rr"

    def update(self, view: ClusterView) -> Placement:
        """The placement to have now. Raises PlanError for a view that contradicts itself."""
        if self.placement is None or self.kind == "rr":
            keep = None if self.placement is None else self.placement.hosts
            self.placement = place_round_robin(view, keep) if self.kind == "rr" else place(view)
            self._shares = shares(view)
            return self.placement
        now = shares(view)
        if _is_valid(view, self.placement.hosts):
            if _drift(self._shares, now) < self.settings.drift:
                return self.placement
            kept = Placement(self.placement.hosts, tolerance(view, self.placement.hosts))
        else:
            kept = place(view, self.placement.hosts)
        fresh = place(view)
        self.placement = fresh if fresh.tolerance > self.settings.gain * kept.tolerance else kept
        self._shares = now
        return self.placement


def placement_steps(view: ClusterView, placement: Placement) -> list[AdapterStep]:
    """Loads and copies that bring the adapters of a placement to its devices, and the evictions that make room.

    Adapters that requests use, or that are pinned, are not evicted.
    """
    problem = Problem(view)
    busy: list[set[int]] = [set() for _ in view.replicas]
    for index, one in enumerate(view.classes):
        if one.count and problem.adapter[index] >= 0:
            busy[problem.source[index]].add(problem.adapter[index])
    steps = []
    for number, replica in enumerate(view.replicas):
        wanted = {
            i for i, one in enumerate(view.adapters) if replica.replica_id in placement.hosts.get(one.adapter, ())
        }
        steps += steps_to(problem, number, wanted, busy[number])
    return steps


def _is_valid(view: ClusterView, hosts: Hosts) -> bool:
    """Whether every adapter has a host, all hosts are there and accept, and nothing is placed that is gone."""
    accepting = {replica.replica_id for replica in view.replicas if replica.accepts}
    names = {one.adapter for one in view.adapters}
    return hosts.keys() == names and all(own and own <= accepting for own in hosts.values())


def _drift(before: dict[str, float], now: dict[str, float]) -> float:
    """Total variation between two distributions of work over adapters."""
    return sum(abs(now.get(a, 0.0) - before.get(a, 0.0)) for a in before.keys() | now.keys()) / 2
