"""Which adapters are on the device, in which slots, and who uses them."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import UnfitAdapterError
from peft_dist.core.request import Request
from peft_dist.engine.adapter_pins import AdapterPins
from peft_dist.engine.adapter_space import AdapterSpace, Lease

logger = logging.getLogger(__name__)

# As many as are read at once: a load that a request waits for begins behind these, and not behind all that a placement
# wishes for.
MAX_LOADS_WITH_AHEAD = 2


class AdapterManager:
    """Decides which adapters, identified by content hash, are on the device.

    An adapter is absent, loading or resident. ``want`` starts loads; whoever carries them out tells the end by
    ``loaded`` or ``load_failed``. A resident one stays while a running request uses it or it is pinned; else it is
    idle, and leaves when its room is needed, least recently used first. Changes of slots are collected here and
    carried out by the engine, in order with the batches.

    Attributes:
        loads, load_failures, evictions: How many there have been.
        version: Grows with every change of what is on the device.
    """

    def __init__(self, num_slots: int, page_rows: int = 1, num_rows: int | None = None) -> None:
        self.space = AdapterSpace(num_slots, page_rows, num_rows)
        self.pins = AdapterPins(self.space)
        self.loads = 0
        self.load_failures = 0
        self.evictions = 0
        self.version = 0
        self._changes: list[tuple[int, AdapterSpec | None]] = []
        self._discards: list[str] = []
        self._loading: dict[str, Lease] = {}
        # To be loaded for requests that may come, when fewer loads are under way.
        self._ahead: OrderedDict[str, AdapterSpec] = OrderedDict()
        # Those of the wishes of the moment whose loads have begun: no later one of them takes their room.
        self._ahead_begun: set[str] = set()
        self._resident: dict[str, Lease] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        # Whose adapters were used since, in this order.
        self._touched: list[Request] = []
        self._running: Counter[str] = Counter()
        self._users: Counter[str] = Counter()
        self._leaving: set[str] = set()
        self._kept: set[str] = set()
        self._keeps: list[str] = []
        self._releases: list[str] = []

    @property
    def on_device(self) -> Mapping[str, Lease]:
        """What each adapter on the device occupies, by content hash; it changes with what is there."""
        return self._resident

    @property
    def resident(self) -> list[str]:
        """Content hashes on the device."""
        return list(self._resident)

    @property
    def loading(self) -> list[str]:
        """Content hashes on their way to the device."""
        return list(self._loading)

    @property
    def is_busy(self) -> bool:
        """Whether something is on its way to the device, or is to be brought there."""
        return bool(self._loading or self._changes or self.pins.has_unmet)

    def check_fits(self, spec: AdapterSpec) -> None:
        """Raises UnfitAdapterError when the adapter is larger than the whole device's room for adapters."""
        if problem := self.space.find_excess(spec):
            raise UnfitAdapterError(
                f"adapter {spec.name!r} {problem}: raise adapter_device_memory (--adapter-device-memory)"
            )

    def check_room(self, spec: AdapterSpec, others: Iterable[AdapterSpec], *, pinned: bool) -> None:
        """Raises AdapterError when the adapter cannot be served, or pinned, beside what is pinned and ``others``."""
        self.check_fits(spec)
        if pinned:
            self.pins.check_pin(spec.name, spec, others)
        else:
            self.pins.check_beside(spec.name, spec)

    # What the engine tells of requests

    def add_user(self, spec: AdapterSpec) -> None:
        """A request for this adapter was admitted; it may wait before it runs."""
        self._users[spec.content_hash] += 1

    def has_users(self, content_hash: str) -> bool:
        """Whether an unfinished request is for this adapter."""
        return self._users[content_hash] > 0

    def remove_user(self, spec: AdapterSpec) -> None:
        """A request for this adapter ended."""
        _decrement(self._users, spec.content_hash)
        if not self._users[spec.content_hash]:
            self._release_weights(spec.content_hash)
        self._drop_if_unneeded(spec.content_hash)
        self._start_ahead()

    # What the scheduler asks

    def is_resident(self, spec: AdapterSpec) -> bool:
        return spec.content_hash in self._resident

    def is_held(self, content_hash: str) -> bool:
        """Whether an adapter is on the device or on its way there."""
        return content_hash in self._resident or content_hash in self._loading

    def want(self, specs: Iterable[AdapterSpec], spared: Collection[str] | None = None) -> None:
        """Load adapters of queued requests, given in order of priority, as far as there is room or can be made.

        Room is made of idle adapters that are neither pinned nor spared; None spares all of ``specs``. Where none can
        be made for an adapter, nothing of lower priority is loaded either: it could only take what the first waits for.
        """
        queued = {spec.content_hash: spec for spec in specs}
        keep = queued if spared is None else spared
        for key, spec in queued.items():
            if not self.is_held(key) and not self._start_load(spec, keep):
                return

    def acquire(self, spec: AdapterSpec) -> int | None:
        """Slot for one more running request; None while the adapter is not resident."""
        lease = self._resident.get(spec.content_hash)
        if lease is None:
            return None
        if self._touched:
            self._age()
        self._running[spec.content_hash] += 1
        self._idle.pop(spec.content_hash, None)
        return lease.slot

    def release(self, spec: AdapterSpec) -> None:
        """A running request stopped running: it ended or was preempted."""
        key = spec.content_hash
        _decrement(self._running, key)
        if not self._running[key]:
            self._idle[key] = None

    def touch(self, requests: list[Request]) -> None:
        """As ``acquire`` and ``release`` of the adapter of each: it was used last. The list is not to be changed."""
        before, self._touched = self._touched, requests
        if before and before != requests[: len(before)]:
            # Of those that are not there any more it counts when they were.
            still = {request.adapter.content_hash for request in requests if request.adapter is not None}
            self._move_to_end(
                [one for one in before if one.adapter is not None and one.adapter.content_hash not in still]
            )

    def _age(self) -> None:
        """Have the order of the idle ones right."""
        touched, self._touched = self._touched, []
        self._move_to_end(touched)

    def _move_to_end(self, requests: Iterable[Request]) -> None:
        idle = self._idle
        for request in requests:
            if request.adapter is not None and request.adapter.content_hash in idle:
                idle.move_to_end(request.adapter.content_hash)

    def slot(self, content_hash: str) -> int:
        """Slot of a resident adapter."""
        return self._resident[content_hash].slot

    def pin(self, name: str, spec: AdapterSpec) -> None:
        """Bring an adapter to the device and keep it there, in place of what the name pinned before."""
        self.pins.add(name, spec)
        self.want_pinned()

    def unpin(self, name: str) -> None:
        """Let what the name pinned leave when its room is needed."""
        self.pins.remove(name)
        self._start_ahead()

    def prefetch(self, spec: AdapterSpec) -> bool:
        """Load an adapter for requests that may come, in room that is free or that no request uses, if there is any.

        Returns whether it is on the device or on its way; few are at once, others begin when these have ended. Where a
        request, or a pin, still waits for its own load, none begins: it could only take what that one waits for.
        """
        key = spec.content_hash
        self._age()
        if key in self._idle:
            self._idle.move_to_end(key)
        if not self._ahead and self._ahead_begun.isdisjoint(self._loading):
            self._ahead_begun.clear()
        if not self.is_held(key) and not self._is_any_awaited():
            self._ahead.setdefault(key, spec)
        self._start_ahead()
        return self.is_held(key)

    def want_pinned(self) -> None:
        """Load what is pinned and on no device; for each, nothing that a request uses leaves if others are enough."""
        for spec in self.pins.unmet:
            key = spec.content_hash
            if self.is_held(key) or self._start_load(spec, self._users) or self._start_load(spec, ()):
                self.pins.settle(key)
        self._start_ahead()

    # What becomes of registrations and loads

    def keep(self, content_hash: str) -> None:
        """An adapter was registered, perhaps again while its last requests were running out."""
        self._leaving.discard(content_hash)

    def keep_weights(self, content_hash: str) -> None:
        """Have the host keep the weights while they are on no device and requests use them: their files may change."""
        if self._users[content_hash] and content_hash not in self._kept and content_hash not in self._resident:
            self._kept.add(content_hash)
            self._keeps.append(content_hash)

    def forget(self, content_hash: str) -> None:
        """Drop an adapter once no request needs it any more and no load of it is under way."""
        self.pins.forget(content_hash)
        self._ahead.pop(content_hash, None)
        self._leaving.add(content_hash)
        self._drop_if_unneeded(content_hash)
        self._start_ahead()

    def loaded(self, content_hash: str) -> AdapterSpec:
        """A load has ended: the adapter, which is returned, can run."""
        self._age()
        lease = self._resident[content_hash] = self._loading.pop(content_hash)
        self.version += 1
        self._idle[content_hash] = None
        self._release_weights(content_hash)
        self.loads += 1
        self._drop_if_unneeded(content_hash)
        self._start_ahead()
        return lease.spec

    def load_failed(self, content_hash: str, error: str) -> None:
        """A load has failed, and its slot holds nothing; a request that comes later has it tried again."""
        lease = self._loading.pop(content_hash)
        self.space.give_back(lease)
        self.load_failures += 1
        logger.warning("adapter %r was not loaded: %s", lease.spec.name, error)
        self._drop_if_unneeded(content_hash)
        self._start_ahead()

    @property
    def has_changes(self) -> bool:
        """Whether one of the following has something to give out."""
        return bool(self._changes or self._keeps or self._releases or self._discards)

    def take_changes(self) -> list[tuple[int, AdapterSpec | None]]:
        """Slots to load an adapter into or, where it is None, to clear; in order, each given out once."""
        changes, self._changes = self._changes, []
        return changes

    def take_keeps(self) -> list[str]:
        """Content hashes whose weights the host is to keep, before the changes are made; each given out once."""
        keeps, self._keeps = self._keeps, []
        return keeps

    def take_releases(self) -> list[str]:
        """Content hashes whose weights the host need not keep any more, after the changes; each given out once."""
        releases, self._releases = self._releases, []
        return releases

    def take_discards(self) -> list[str]:
        """Content hashes that nobody needs any more, each given out once."""
        discards, self._discards = self._discards, []
        return discards

    def check(self) -> None:
        """Raise AssertionError unless every slot and page is owned once and everyone's state is consistent."""
        assert not self._loading.keys() & self._resident.keys(), "an adapter both loading and resident"
        self.space.check([*self._loading.values(), *self._resident.values()])
        assert self._running.keys() | self._idle.keys() == self._resident.keys(), "resident adapters"
        assert not self._running.keys() & self._idle.keys(), "an adapter both running and idle"
        assert all(self._users[key] >= count > 0 for key, count in self._running.items()), "users"
        self.pins.check()
        assert self._kept <= self._users.keys() - self._resident.keys(), "weights kept for nobody"

    def _is_any_awaited(self) -> bool:
        """Whether a request, or a pin, waits for an adapter that is neither on the device nor on its way there."""
        return bool(self.pins.unmet) or not all(map(self.is_held, self._users))

    def _start_ahead(self) -> None:
        """Begin what was wished for, as far as few loads are under way; for what there is no room is passed over."""
        while self._ahead and len(self._loading) < MAX_LOADS_WITH_AHEAD and not self._is_any_awaited():
            key, spec = self._ahead.popitem(last=False)
            if not self.is_held(key) and self._start_load(spec, self._users.keys() | self._ahead_begun):
                self._ahead_begun.add(key)

    def _start_load(self, spec: AdapterSpec, queued: Collection[str]) -> bool:
        """Whether there was room, or could be made."""
        self._age()
        evictable = [self._resident[key] for key in self._idle if key not in queued and key not in self.pins]
        victims = self.space.victims(spec, evictable)
        if victims is None:
            return False
        for victim in victims:
            self._evict(victim.spec.content_hash)
            self.evictions += 1
        lease = self.space.take(spec)
        self._loading[spec.content_hash] = lease
        self._changes.append((lease.slot, spec))
        return True

    def _evict(self, key: str) -> None:
        lease = self._resident.pop(key)
        self.version += 1
        self.keep_weights(key)
        del self._idle[key]
        self.space.give_back(lease)
        self._changes.append((lease.slot, None))

    def _release_weights(self, key: str) -> None:
        if key in self._kept:
            self._kept.remove(key)
            self._releases.append(key)

    def _drop_if_unneeded(self, key: str) -> None:
        if key not in self._leaving or self._users[key] or key in self._loading:
            return
        self._leaving.discard(key)
        if key in self._resident:
            self._evict(key)
        self._discards.append(key)


def _decrement(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]
