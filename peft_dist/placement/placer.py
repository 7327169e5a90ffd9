"""Keeps a placement while it is good enough: adapters are not moved for every flutter of the rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import msgspec

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


class Search(msgspec.Struct, frozen=True):
    """What a placement is found from. ``hosts``: The present ones, None before the first; ``gain``: As in settings."""

    kind: MigrationKind
    view: ClusterView
    hosts: Hosts | None = None
    gain: float = 1.0

    def run(self) -> Placement:
        """The placement to have: the present one unless one with more copies, or quite another, is better by ``gain``.

        Takes seconds for a thousand adapters. Raises PlanError for a view that contradicts itself.
        """
        if self.kind == "rr":
            return place_round_robin(self.view, self.hosts)
        if self.hosts is None:
            return place(self.view)
        found = [place(self.view, self.hosts), place(self.view)]
        if _is_valid(self.view, self.hosts):
            found.insert(0, Placement(self.hosts, tolerance(self.view, self.hosts)))
        best = found[0]
        for other in found[1:]:
            if other.tolerance > self.gain * best.tolerance:
                best = other
        return best


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
        self._accepting: frozenset[int] = frozenset()

    @property
    def migrates(self) -> bool:
        return self.kind == "dlora"

    @property
    def swaps_on_dispatch(self) -> bool:
        return self.kind != "rr"

    def update(self, view: ClusterView) -> Placement:
        """The placement to have now. Raises PlanError for a view that contradicts itself."""
        search = self.find_search(view)
        if search is not None:
            self.adopt(search, search.run())
        assert self.placement is not None
        return self.placement

    def find_search(self, view: ClusterView, *, from_devices: bool = False) -> Search | None:
        """What to look for a new placement with; None while the present one is good enough. Cheap.

        ``from_devices``: Where there is none yet, the one to keep is that of the adapters on the devices.
        """
        hosts = None if self.placement is None else self.placement.hosts
        if hosts is None and from_devices and (found := _on_devices(view)):
            return Search(self.kind, view, found, self.settings.gain)
        if hosts is not None and self._accepting == _accepting(view) and _is_valid(view, hosts) and self._is_near(view):
            return None
        return Search(self.kind, view, hosts, self.settings.gain)

    def _is_near(self, view: ClusterView) -> bool:
        return self.kind == "rr" or _drift(self._shares, shares(view)) < self.settings.drift

    def adopt(self, search: Search, placement: Placement) -> None:
        """Take what a search has found."""
        self.placement = placement
        self._shares, self._accepting = shares(search.view), _accepting(search.view)


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


def _accepting(view: ClusterView) -> frozenset[int]:
    return frozenset(replica.replica_id for replica in view.replicas if replica.accepts)


def _is_valid(view: ClusterView, hosts: Hosts) -> bool:
    """Whether all hosts are there and accept, no adapter is new, and nothing is placed that is gone.

    An adapter that fitted nowhere has no host, and is not looked at again for that.
    """
    accepting = _accepting(view)
    return hosts.keys() == {one.adapter for one in view.adapters} and all(own <= accepting for own in hosts.values())


def _on_devices(view: ClusterView) -> Hosts:
    found = {
        one.adapter: frozenset(replica.replica_id for replica in view.replicas if one.adapter in replica.device)
        for one in view.adapters
    }
    return {adapter: hosts for adapter, hosts in found.items() if hosts}


def _drift(before: dict[str, float], now: dict[str, float]) -> float:
    """Total variation between two distributions of work over adapters."""
    return sum(abs(now.get(a, 0.0) - before.get(a, 0.0)) for a in before.keys() | now.keys()) / 2
