"""Who is on the device: room is never exceeded, only idle adapters leave, in order, and no load is lost."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import AdapterError
from peft_dist.engine.adapter_manager import AdapterManager
from peft_dist.engine.adapter_space import AdapterSpace, Lease

MODULES = ("q", "v", "up")


def spec_of(name: str, **ranks: int) -> AdapterSpec:
    return AdapterSpec(name, f"hash of {name}", "", ranks or {"q": 4}, 10)


def settle(manager: AdapterManager) -> None:
    """All loads under way end well."""
    for key in manager.loading:
        manager.loaded(key)
    manager.check()


def load(manager: AdapterManager, *specs: AdapterSpec) -> None:
    manager.want(specs)
    settle(manager)


def use(manager: AdapterManager, spec: AdapterSpec) -> int | None:
    manager.add_user(spec)
    return manager.acquire(spec)


def stop(manager: AdapterManager, spec: AdapterSpec) -> None:
    manager.release(spec)
    manager.remove_user(spec)


class World:
    """Drives a manager at random and plays the executor that obeys it."""

    def __init__(self, num_slots: int, page_rows: int, num_pages: int, specs: list[AdapterSpec]) -> None:
        self.manager = AdapterManager(num_slots, page_rows, num_pages * page_rows)
        self.num_slots, self.page_rows, self.num_pages = num_slots, page_rows, num_pages
        self.specs = specs
        self.slots: dict[int, AdapterSpec] = {}
        self.waiting: list[AdapterSpec] = []
        self.running: list[AdapterSpec] = []
        self.pinned: dict[str, AdapterSpec] = {}
        self.failed: set[str] = set()
        self.used_last: list[str] = []
        self.under_way: dict[str, int] = {}

    def obey(self, before: list[str], wanted: list[str]) -> None:
        busy = {spec.content_hash for spec in self.running}
        pinned = {spec.content_hash for spec in self.pinned.values()}
        evicted = []
        for slot, spec in self.manager.take_changes():
            if spec is None:
                evicted.append(self.slots.pop(slot).content_hash)
            else:
                assert slot not in self.slots, "a load over something"
                self.slots[slot] = spec
                self.under_way[spec.content_hash] = slot
        for key in evicted:
            assert key not in busy and key not in pinned and key not in wanted and key in before
        candidates = [key for key in before if key not in busy and key not in pinned and key not in wanted]
        if not any(self.manager.has_users(key) for key in evicted):
            # Those in use went last, or for an adapter that is queued, which spares them by itself.
            candidates = [key for key in candidates if not self.manager.has_users(key)]
        for key in evicted:
            older = [other for other in candidates if self._age(other) < self._age(key) and other not in evicted]
            # An older one may stay only if it would have been no help: it has none of the modules asked for, or
            # the ones that went were enough without it.
            if self.num_pages >= 1000:
                assert not older, "not the least recently used"
        needed = Counter()
        for spec in self.slots.values():
            needed.update({m: -(-rank // self.page_rows) for m, rank in spec.ranks.items()})
        assert all(count <= self.num_pages for count in needed.values()) and len(self.slots) <= self.num_slots
        self.manager.check()

    def _age(self, key: str) -> int:
        return self.used_last.index(key) if key in self.used_last else -1

    def touch(self, key: str) -> None:
        if key in self.used_last:
            self.used_last.remove(key)
        self.used_last.append(key)

    def act(self, what: str, number: int) -> None:
        before = self.manager.resident
        spec = self.specs[number % len(self.specs)]
        wanted: list[str] = []
        if what == "arrive":
            self.manager.add_user(spec)
            self.waiting.append(spec)
        elif what == "schedule":
            self.manager.want_pinned()
            self.obey(before, [])
            before = self.manager.resident
            wanted = [spec.content_hash for spec in self.waiting]
            self.manager.want(self.waiting)
            for waiting in list(self.waiting):
                slot = self.manager.acquire(waiting)
                assert (slot is None) == (not self.manager.is_resident(waiting))
                if slot is not None:
                    assert slot == self.manager.slot(waiting.content_hash)
                    self.waiting.remove(waiting)
                    self.running.append(waiting)
        elif what == "end" and self.running:
            ended = self.running.pop(number % len(self.running))
            stop(self.manager, ended)
            if ended not in self.running:
                self.touch(ended.content_hash)
        elif what == "preempt" and self.running:
            preempted = self.running.pop(number % len(self.running))
            self.manager.release(preempted)
            self.waiting.insert(0, preempted)
            if preempted not in self.running:
                self.touch(preempted.content_hash)
        elif what == "pin":
            self.pin(f"name {number % 3}", spec)
        elif what == "unpin":
            self.pinned.pop(f"name {number % 3}", None)
            self.manager.unpin(f"name {number % 3}")
        elif what == "prefetch":
            key, loading = spec.content_hash, self.manager.loading
            # Whatever it is worth, nothing that a request uses leaves for it, and nobody's load is kept waiting.
            wanted = [other.content_hash for other in self.specs if self.manager.has_users(other.content_hash)]
            awaited = [other for other in wanted if not self.manager.is_held(other)]
            assert self.manager.prefetch(spec) == self.manager.is_held(key)
            if self.manager.is_resident(spec) and key not in {other.content_hash for other in self.running}:
                self.touch(key)
            assert not awaited or self.manager.loading == loading
        elif what in ("arrived", "failed") and self.under_way:
            key = sorted(self.under_way)[number % len(self.under_way)]
            slot = self.under_way.pop(key)
            if what == "arrived":
                self.manager.loaded(key)
                self.touch(key)
            else:
                self.failed.add(key)
                del self.slots[slot]
                self.manager.load_failed(key, "the disk is gone")
        self.obey(before, wanted)

    def pin(self, name: str, spec: AdapterSpec) -> None:
        try:
            self.manager.pins.check_pin(name, spec, self.specs)
        except AdapterError:
            return
        self.pinned[name] = spec
        self.failed.discard(spec.content_hash)
        self.manager.pin(name, spec)

    def finish(self) -> None:
        """Whatever is pinned, everything that waits runs in the end: no load is lost."""
        for _ in range(3 * len(self.specs) + len(self.waiting) + 3):
            for what in ("schedule", *["arrived"] * len(self.specs), "schedule", *["end"] * len(self.running)):
                self.act(what, 0)
            while self.running:
                self.act("end", 0)
        assert not self.waiting and not self.under_way
        pinned = {spec.content_hash for spec in self.pinned.values()}
        assert pinned - self.failed <= set(self.manager.resident) and len(pinned) < max(self.num_slots, 2)
        assert not self.manager._users and not self.manager._running


ranks = st.dictionaries(st.sampled_from(MODULES), st.integers(1, 16), min_size=1)
actions = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *["arrive", "arrive", "schedule", "schedule", "end", "preempt", "pin", "unpin", "arrived", "failed"],
                "prefetch",
            ]
        ),
        st.integers(0, 100),
    ),
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(ranks, min_size=1, max_size=7),
    st.integers(1, 4),
    st.sampled_from([1, 4]),
    st.sampled_from([16, 20, 1000]),
    actions,
)
def test_room_is_kept_and_no_load_is_lost(all_ranks, num_slots, page_rows, num_pages, history) -> None:
    specs = [spec_of(str(number), **ranks) for number, ranks in enumerate(all_ranks)]
    world = World(num_slots, page_rows, num_pages, specs)
    for what, number in history:
        world.act(what, number)
    world.finish()


@settings(max_examples=200)
@given(ranks, st.lists(ranks, max_size=6), st.integers(1, 6))
def test_only_as_many_leave_as_needed(new, held, num_slots) -> None:
    space = AdapterSpace(num_slots, 4, 16)
    leases: list[Lease] = []
    for number, own in enumerate(held):
        spec = spec_of(str(number), **own)
        if space.victims(spec, []) == []:
            leases.append(space.take(spec))
    spec = spec_of("new", **new)
    victims = space.victims(spec, leases)
    assert victims is not None, "everything may leave, so there is room"
    for victim in victims:
        space.give_back(victim)
    assert space.victims(spec, []) == []
    for victim in victims:
        space.give_back(space.take(spec))
        spared = space.take(victim.spec)
        assert space.victims(spec, []) is None, "this one left for nothing"
        space.give_back(spared)


def test_the_least_recently_used_leaves_first() -> None:
    a, b, c, d = (spec_of(name) for name in "abcd")
    manager = AdapterManager(3)
    load(manager, a, b, c)
    for spec in (b, a, c):
        use(manager, spec)
        stop(manager, spec)
    load(manager, d)
    assert set(manager.resident) == {spec.content_hash for spec in (a, c, d)}
    assert manager.take_changes()[-2:] == [(1, None), (1, d)]
    assert (manager.loads, manager.evictions) == (4, 1)


def test_running_pinned_and_wanted_adapters_stay() -> None:
    a, b, c, d = (spec_of(name) for name in "abcd")
    manager = AdapterManager(3)
    load(manager, a, b, c)
    use(manager, a)
    manager.pin("b", b)
    manager.want([d, c])
    assert manager.loading == [] and manager.acquire(d) is None
    manager.want([d])
    assert manager.loading == [d.content_hash] and not manager.is_resident(c)


def test_nothing_of_lower_priority_takes_what_the_first_waits_for() -> None:
    big, small, running = spec_of("big", q=16), spec_of("small", q=4), spec_of("running", q=12)
    manager = AdapterManager(4, 4, 16)
    load(manager, running)
    use(manager, running)
    manager.want([big, small])
    assert manager.loading == []
    manager.want([small, big])
    assert manager.loading == [small.content_hash]


def test_queued_adapters_are_fetched_ahead_as_far_as_there_is_room() -> None:
    specs = [spec_of(str(i), q=8) for i in range(6)]
    manager = AdapterManager(8, 4, 32)
    manager.want(specs)
    assert manager.loading == [spec.content_hash for spec in specs[:4]]
    manager.want(specs)
    assert len(manager.take_changes()) == 4, "no load is begun twice"


def test_an_adapter_that_leaves_while_it_loads_is_dropped_when_it_arrives() -> None:
    a = spec_of("a")
    for ends_well in (True, False):
        manager = AdapterManager(1)
        manager.want([a])
        manager.forget(a.content_hash)
        assert manager.take_changes() == [(0, a)] and manager.take_discards() == []
        manager.loaded(a.content_hash) if ends_well else manager.load_failed(a.content_hash, "no")
        assert manager.take_changes() == ([(0, None)] if ends_well else [])
        assert manager.take_discards() == [a.content_hash] and manager.resident == []
        manager.check()


def test_a_forgotten_adapter_stays_for_its_users_and_loses_its_pins() -> None:
    a = spec_of("a")
    manager = AdapterManager(1)
    load(manager, a)
    use(manager, a)
    manager.pin("a", a)
    manager.pin("also a", a)
    manager.forget(a.content_hash)
    assert manager.resident and not manager.take_discards()
    stop(manager, a)
    assert not manager.resident and manager.take_discards() == [a.content_hash]
    assert manager.pins.specs == []
    manager.forget(a.content_hash)
    manager.keep(a.content_hash)
    assert manager.take_discards() == [a.content_hash]


def test_what_can_never_fit_is_refused_in_words() -> None:
    manager = AdapterManager(8, 4, 64)
    manager.check_fits(spec_of("fits", q=64, v=1))
    with pytest.raises(
        AdapterError, match=r"'big' has rank 65 in v, which takes 17 pages .*16 pages.*--adapter-device"
    ):
        manager.check_fits(spec_of("big", q=3, v=65))
    AdapterManager(8).check_fits(spec_of("any", q=10_000))


def test_weights_are_kept_while_an_adapter_with_users_is_off_the_device() -> None:
    a, b, idle = spec_of("a"), spec_of("b"), spec_of("idle")
    manager = AdapterManager(1)
    load(manager, idle)
    manager.want([a])
    assert manager.take_keeps() == [], "nobody uses what was evicted"
    manager.loaded(a.content_hash)
    manager.add_user(a)
    manager.keep_weights(a.content_hash)
    assert manager.take_keeps() == [], "they are on the device"
    manager.want([b])
    assert manager.take_keeps() == [a.content_hash]
    manager.loaded(b.content_hash)
    manager.want([a])
    manager.loaded(a.content_hash)
    assert manager.take_releases() == [a.content_hash] and manager.take_keeps() == []
    manager.want([b])
    assert manager.take_keeps() == [a.content_hash] and manager.take_releases() == []
    manager.remove_user(a)
    assert manager.take_releases() == [a.content_hash]
    manager.check()
