"""Where adapters should be before their requests come.

As dLoRA (Wu et al., OSDI'24) does, by burst tolerance: how many times more of one adapter its replicas could take
while the others get what they always get. The adapter that could take least decides; the greedy search raises it.
Written from a description of the artifact; there free memory stands for throughput, here seconds of work a second do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from peft_dist.placement.types import ClusterView

Hosts = dict[str, frozenset[int]]
"""By adapter, ids of the replicas that should have it."""

# Rates are taken relative to one another, as if they filled this share of the cluster.
UTILISATION = 0.5
# An adapter nobody asked for yet counts as this share of the mean one.
LEAST_SHARE = 0.05
# Room that extra copies leave free on each replica, for adapters that come unplanned.
SPARE = 0.125
# Replicas that are tried for a copy.
NUM_TRIED = 4
RESOLUTION = 1e-9


class Placement(msgspec.Struct, frozen=True):
    """Replicas of every adapter; none for those that fit nowhere. ``tolerance`` is the least burst tolerance."""

    hosts: Hosts
    tolerance: float


def shares(view: ClusterView) -> dict[str, float]:
    """Each adapter's part of all work, at least ``LEAST_SHARE`` of an even part."""
    work = {one.adapter: one.rate * one.work for one in view.adapters}
    least = LEAST_SHARE * (sum(work.values()) / len(work) if any(work.values()) else 1.0) if work else 0.0
    raised = {adapter: max(own, least) for adapter, own in work.items()}
    total = sum(raised.values())
    return {adapter: own / total for adapter, own in raised.items()}


def place(view: ClusterView, keep: Mapping[str, frozenset[int]] | None = None) -> Placement:
    """A burst-tolerant placement.

    Args:
        view: Replicas with their memory, adapters with rate and work; its request classes do not matter.
        keep: Hosts that stay hosts, where replica and adapter are still there and fit.

    Every adapter gets one replica, the busiest first, while there is room; then the one with the least tolerance gets
    another, as long as that raises the least. Raises PlanError as ``ClusterView.check``.
    """
    view.check()
    found, has_early = _placed(view, keep or {}, early_copies=True)
    if has_early:
        # They may have taken the room of a large adapter.
        other, _ = _placed(view, keep or {}, early_copies=False)
        found = max(found, other, key=lambda one: one.tolerance)
    return found


def place_round_robin(view: ClusterView, keep: Mapping[str, frozenset[int]] | None = None) -> Placement:
    """Adapter i on replica i modulo their number, then one more adapter on each replica but the last.

    Total: replicas + adapters - 1, as in dLoRA's artifact. Rates do not matter. Raises PlanError as ``place``.
    """
    view.check()
    search = _Search(view)
    search.put_known(keep or {})
    accepting = [replica.replica_id for replica in view.replicas if replica.accepts]
    for index, one in enumerate(view.adapters):
        if not search.hosts[one.adapter]:
            turn = index % max(len(accepting), 1)
            search.put_first(one.adapter, accepting[turn:] + accepting[:turn])
    for index, replica in enumerate(accepting[:-1] if not keep else []):
        # Not the adapter that the replica has already: the one of its neighbour.
        for turn in range(1, len(view.adapters)):
            if search.put_first(view.adapters[(index + turn) % len(view.adapters)].adapter, [replica]):
                break
    return search.placement()


def tolerance(view: ClusterView, hosts: Mapping[str, frozenset[int]]) -> float:
    """The least burst tolerance of a placement: 1 is what is asked for now, below 1 somebody has no replica at all."""
    search = _Search(view)
    search.put_known(hosts, fit=True)
    return search.least()


def _placed(view: ClusterView, keep: Mapping[str, frozenset[int]], *, early_copies: bool) -> tuple[Placement, bool]:
    """And whether copies were made early."""
    search = _Search(view)
    search.put_known(keep)
    has_early = search.place_each(early_copies)
    search.add_copies()
    return search.placement(), has_early


class _Search:
    def __init__(self, view: ClusterView) -> None:
        self._sizes = {one.adapter: one.num_bytes for one in view.adapters}
        best = min((r.costs.decode_token for r in view.replicas if r.costs.decode_token > 0), default=1.0)
        # Seconds of the fastest replica's work that each does in a second.
        self._capacity = {
            r.replica_id: best / r.costs.decode_token if r.costs.decode_token else 1.0 for r in view.replicas
        }
        total = UTILISATION * sum(self._capacity.values())
        self._load = {adapter: share * total for adapter, share in shares(view).items()}
        self._room = {r.replica_id: r.adapter_bytes for r in view.replicas}
        self._spare = {r.replica_id: int(SPARE * r.adapter_bytes) for r in view.replicas}
        self._accepting = [r.replica_id for r in view.replicas if r.accepts]
        self._slack = dict(self._capacity)
        # Each replica's slack when it was last asked for, and what it is sorted by.
        self._rounded = dict.fromkeys(self._slack, (-1.0, 1.0))
        self.hosts: dict[str, set[int]] = {one.adapter: set() for one in view.adapters}
        self._on: dict[int, set[str]] = {r.replica_id: set() for r in view.replicas}
        # Burst tolerances, but for those that have changed since they were asked for.
        self._known: dict[str, float] = {}
        self._stale = set(self.hosts)
        for replica in view.replicas:
            for adapter in replica.pinned:
                self._put(adapter, replica.replica_id)

    def put_known(self, hosts: Mapping[str, frozenset[int]], fit: bool = False) -> None:
        """Add hosts that may be out of date, where they still can be; ``fit`` takes their room for granted."""
        for adapter, replicas in hosts.items():
            for replica in sorted(replicas & set(self._accepting)):
                if adapter not in self.hosts or replica in self.hosts[adapter]:
                    continue
                if fit or self._sizes[adapter] <= self._room[replica]:
                    self._put(adapter, replica)

    def put_first(self, adapter: str, replicas: list[int]) -> bool:
        """Put an adapter on the first of these replicas that has room and not the adapter."""
        for replica in replicas:
            if replica not in self.hosts[adapter] and self._sizes[adapter] <= self._room[replica]:
                self._put(adapter, replica)
                return True
        return False

    def place_each(self, early_copies: bool) -> bool:
        """One replica for each adapter that has none, the busiest first, while there is room.

        With ``early_copies`` one that would fill its replica gets as many as bring its part of each down to the mean,
        at once: one copy at a time would overload the second replica before the third relieves it. Returns whether one
        got more than one.
        """
        has_early = False
        homeless = [a for a in sorted(self.hosts, key=lambda a: (-self._load[a], a)) if not self.hosts[a]]
        needed = sum(self._sizes[adapter] for adapter in homeless)
        for adapter in homeless:
            needed -= self._sizes[adapter]
            while self.put_first(adapter, self._by_slack(self._accepting)):
                has_early |= len(self.hosts[adapter]) > 1
                speed = sum(self._capacity[replica] for replica in self.hosts[adapter])
                left = sum(self._room[replica] for replica in self._accepting)
                enough = self._load[adapter] <= UTILISATION * speed
                if enough or not early_copies or left < needed + self._sizes[adapter]:
                    break
        return has_early

    def add_copies(self) -> None:
        """Copies for those that could take least, while these raise the least tolerance or free others of load."""
        open_to_more = {adapter for adapter, hosts in self.hosts.items() if hosts}
        while open_to_more:
            known = self._tolerances()
            _, adapter = min(zip(map(known.__getitem__, open_to_more), open_to_more, strict=True))
            if not self._copy(adapter):
                open_to_more.discard(adapter)

    def least(self) -> float:
        return min(self._tolerances().values(), default=math.inf)

    def placement(self) -> Placement:
        return Placement({adapter: frozenset(hosts) for adapter, hosts in self.hosts.items()}, self.least())

    def _copy(self, adapter: str) -> bool:
        known = self._tolerances()
        before = min(known.values()), known[adapter]
        size, hosts, room, spare = self._sizes[adapter], self.hosts[adapter], self._room, self._spare
        free = [r for r in self._accepting if size <= room[r] - spare[r] and r not in hosts]
        tried: list[tuple[float, float, int, int]] = []
        for replica in self._by_slack(free)[:NUM_TRIED]:
            self._put(adapter, replica)
            # What leaves somebody with less than the best so far is not taken, whatever else comes of it.
            bound = tried[-1][0] if tried else before[0]
            if (least := self._least_after(replica, known, bound)) >= bound:
                tried.append((least, self._tolerance(adapter), -len(tried), replica))
            self._take(adapter, replica)
        least, own, _, replica = max(tried, default=(*before, 0, -1))
        # The least never falls, and one of both rises: so that this ends.
        if least < before[0] or own <= before[1] + RESOLUTION:
            return False
        self._put(adapter, replica)
        return True

    def _by_slack(self, replicas: list[int]) -> list[int]:
        """Replicas with the most spare work first; of equals those with the most room."""
        slack, room, least_first = self._slack, self._room, []
        for replica in replicas:
            # Digits take longer to find than all else here, and most replicas are as they were.
            own, rounded = slack[replica], self._rounded[replica]
            if rounded[0] != own:
                rounded = self._rounded[replica] = own, -round(own, 9)
            least_first.append((rounded[1], -room[replica], replica))
        least_first.sort()
        return [replica for _, _, replica in least_first]

    def _tolerances(self) -> dict[str, float]:
        """How many times its present load each adapter's hosts could take of it, others as they are."""
        # Written out: a placement asks it some hundred thousand times.
        known, hosts, loads, slack = self._known, self.hosts, self._load, self._slack.__getitem__
        for adapter in self._stale:
            own, load = hosts[adapter], loads[adapter]
            known[adapter] = (load + sum(map(slack, own))) / load if own else 0.0
        self._stale.clear()
        return known

    def _tolerance(self, adapter: str) -> float:
        hosts, load = self.hosts[adapter], self._load[adapter]
        return (load + sum(map(self._slack.__getitem__, hosts))) / load if hosts else 0.0

    def _least_after(self, replica: int, known: Mapping[str, float], enough: float) -> float:
        """The least tolerance now that a replica was given one more adapter, where ``known`` were those before: but for
        rounding, nobody else's has fallen. Of what is not ``enough`` any that is found."""
        hosts, loads, slack = self.hosts, self._load, self._slack.__getitem__
        least = math.inf
        for adapter in self._on[replica]:
            load = loads[adapter]
            own = (load + sum(map(slack, hosts[adapter]))) / load
            if own < least:
                least = own
                if own < enough:
                    return own
        bound, stale = least + RESOLUTION, self._stale
        low = [adapter for adapter, before in known.items() if before <= bound]
        return min([least, *(self._tolerance(one) if one in stale else known[one] for one in low)])

    def _put(self, adapter: str, replica: int) -> None:
        hosts = self.hosts[adapter]
        self._share(adapter, 1)
        hosts.add(replica)
        self._on[replica].add(adapter)
        self._share(adapter, -1)
        self._stale.update(*map(self._on.__getitem__, hosts))
        self._room[replica] -= self._sizes[adapter]

    def _take(self, adapter: str, replica: int) -> None:
        hosts = self.hosts[adapter]
        self._stale.update(*map(self._on.__getitem__, hosts))
        self._share(adapter, 1)
        hosts.discard(replica)
        self._on[replica].discard(adapter)
        self._share(adapter, -1)
        self._room[replica] += self._sizes[adapter]

    def _share(self, adapter: str, sign: int) -> None:
        """Give the adapter's load, in parts as its hosts are fast, back to their slack (1), or take it (-1)."""
        hosts, capacity, slack = self.hosts[adapter], self._capacity, self._slack
        load, speed = sign * self._load[adapter], sum(map(capacity.__getitem__, hosts))
        for replica in hosts:
            slack[replica] += load * capacity[replica] / speed
