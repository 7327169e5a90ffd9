"""Which replicas should have which adapters: where requests may go by that, and what is brought there ahead of them."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass

from peft_dist.core.messages import PrefetchAdapter
from peft_dist.orchestrator.adapter_calls import AdapterCalls, to
from peft_dist.orchestrator.events import Event, PlacementDue
from peft_dist.orchestrator.records import Outgoing, Replica, RequestRecord
from peft_dist.orchestrator.replicas import ReplicaTable
from peft_dist.orchestrator.views import Views
from peft_dist.placement.placer import Placer, Search, placement_steps
from peft_dist.placement.placing import Placement
from peft_dist.placement.types import AdapterStep

# Rates move slowly; adapters and replicas that come or go are seen at once.
LOOK_SECONDS = 5.0
# Between two loads of one adapter ahead, neither of which was seen to bring it: from ``LOOK_SECONDS`` on, doubling.
LONGEST_AGAIN_SECONDS = 600.0


@dataclass(slots=True)
class _Wish:
    """An adapter is to be on one incarnation of a replica. ``at``: When to look next, ``wait``: for how long after a
    load was sent."""

    at: float
    wait: float = LOOK_SECONDS


class Hosting:
    """The placement in force. Every replica can run every adapter; a placement says where it is to be at hand.

    Attributes:
        num_placements: Placements that were made.
    """

    def __init__(
        self,
        placer: Placer,
        views: Views,
        replicas: ReplicaTable,
        calls: AdapterCalls,
        events: list[Event],
        *,
        sends_ahead: bool = True,
    ) -> None:
        """``sends_ahead``: Whether replicas keep adapters on their devices at all."""
        self._placer = placer
        self._views = views
        self._replicas = replicas
        self._calls = calls
        self._events = events
        self._sends_ahead = sends_ahead
        self._search: Search | None = None
        # By replica; and by incarnation of one.
        self._hosted: dict[int, frozenset[str]] = {}
        self._wishes: dict[int, dict[str, _Wish]] = {}
        self._seen: tuple[object, ...] = ()
        self._look_at = 0.0
        self.num_placements = 0

    @property
    def placement(self) -> Placement | None:
        return self._placer.placement

    def is_placed(self, content_hash: str, replica_id: int) -> bool:
        """Whether a content is, or will soon be, at hand on a replica."""
        return content_hash in self._hosted.get(replica_id, ())

    def placed(self, content_hash: str) -> Container[int]:
        """Replicas on which a content is, or will soon be, at hand."""
        return self.placement.hosts.get(content_hash, ()) if self.placement is not None else ()

    def can_run(self, replica: Replica, content_hash: str) -> bool:
        """Whether a replica knows a content, at hand or not."""
        return self._calls.holds(replica, content_hash)

    def among(self, record: RequestRecord, able: Sequence[Replica], now: float) -> list[Replica]:
        """Those of the replicas that can run a request to which it may go; all of them where none of its hosts can."""
        if self._placer.swaps_on_dispatch or not record.content_hash or len(self._replicas.all()) < 2:
            return list(able)
        if self.placement is None or record.content_hash not in self.placement.hosts:
            self._place_in_turn(now)
        hosts = [replica for replica in able if self.is_placed(record.content_hash, replica.replica_id)]
        return hosts or list(able)

    def given(self, record: RequestRecord, replica: Replica) -> None:
        """A request was sent to a replica."""

    def check(self, now: float) -> list[Outgoing]:
        """See whether the placement is still good enough; ``PlacementDue`` follows when another is to be looked for."""
        members = self._members()
        if members != self._seen or now >= self._look_at:
            self._seen, self._look_at = members, now + LOOK_SECONDS
            if not self._placer.swaps_on_dispatch:
                self._place_in_turn(now)
            elif self._search is None and (self.placement is not None or members[-1]):
                view = self._views.placing(self._views.adapters(now))
                self._search = self._placer.find_search(view, from_devices=self._has_adopted())
                if self._search is not None:
                    self._events.append(PlacementDue(self._search))
        return self._send_ahead(now)

    def found(self, search: Search, placement: Placement | None, now: float) -> list[Outgoing]:
        """What a search ended with; None: it failed, and the placement stays until the next check."""
        self._search = None
        if placement is None:
            return []
        self._adopt(search, placement)
        # Others may have come meanwhile.
        self._look_at = now
        return self._send_ahead(now)

    def carry_out(self, steps: Sequence[AdapterStep]) -> list[Outgoing]:
        """Have replicas load adapters. What leaves for them is the replica's choice, and nothing that requests use."""
        ready = {replica.replica_id: replica for replica in self._replicas.ready()}
        out: list[Outgoing] = []
        for step in steps:
            replica = ready.get(step.replica)
            if step.kind != "evict" and replica is not None and self._calls.holds(replica, step.adapter):
                out += self._load(replica, [step.adapter])
        return out

    def _members(self) -> tuple[object, ...]:
        """What a placement is of."""
        return tuple(replica.epoch for replica in self._replicas.ready()), self._views.contents()

    def _has_adopted(self) -> bool:
        """Whether replicas brought adapters from an earlier life: what is there had better stay."""
        return any(replica.was_adopted for replica in self._replicas.ready())

    def _place_in_turn(self, now: float) -> None:
        """Round robin is cheap, and an adapter must have its place before its first request has one.

        It is never made anew: replicas that will serve again keep their adapters.
        """
        adapters = self._views.adapters(now)
        view = self._views.placing(adapters, coming=True)
        search = self._placer.find_search(view, from_devices=self._has_adopted())
        if adapters and search is not None:
            self._adopt(search, search.run())

    def _adopt(self, search: Search, placement: Placement) -> None:
        self._placer.adopt(search, placement)
        self.num_placements += 1
        hosted: dict[int, set[str]] = {}
        for content, replicas in placement.hosts.items():
            for replica_id in replicas:
                hosted.setdefault(replica_id, set()).add(content)
        self._hosted = {replica_id: frozenset(contents) for replica_id, contents in hosted.items()}

    def _send_ahead(self, now: float) -> list[Outgoing]:
        """Have replicas load what is placed there, as far as there is room beside what requests use.

        Whatever was there once is not sent again: what put it out was asked for.
        """
        lacking = {}
        wishes, self._wishes = self._wishes, {}
        for replica in self._replicas.ready():
            hosted, before = self._hosted.get(replica.replica_id, frozenset()), wishes.get(replica.epoch, {})
            own = {content: wish for content, wish in before.items() if content in hosted}
            new = hosted.difference(before)
            own |= {content: _Wish(now) for content in new if self._calls.holds(replica, content)}
            for content in replica.stats.resident_adapters:
                if content in own:
                    own[content].at = math.inf
            self._wishes[replica.epoch] = own
            lacks = {content: wish for content, wish in own.items() if wish.at <= now}
            if lacks:
                lacking[replica.replica_id] = replica, lacks
        if not lacking or self.placement is None or not self._sends_ahead:
            return []
        view = self._views.loading(self._views.adapters(now))
        chosen: dict[int, list[str]] = {}
        for step in placement_steps(view, self.placement):
            if step.kind != "evict" and step.replica in lacking and step.adapter in lacking[step.replica][1]:
                chosen.setdefault(step.replica, []).append(step.adapter)
        for replica_id, (_, lacks) in lacking.items():
            for content, wish in lacks.items():
                wish.at = now + LOOK_SECONDS
                if content in chosen.get(replica_id, ()):
                    wish.at, wish.wait = now + wish.wait, min(2 * wish.wait, LONGEST_AGAIN_SECONDS)
        return [out for replica_id, contents in chosen.items() for out in self._load(lacking[replica_id][0], contents)]

    def _load(self, replica: Replica, contents: Sequence[str]) -> list[Outgoing]:
        if not self._sends_ahead:
            return []
        return [to(replica, PrefetchAdapter(content_hash=content)) for content in contents]
