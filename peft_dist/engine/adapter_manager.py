"""Which adapters are on the device, in which slots, and who uses them."""

from __future__ import annotations

from collections import Counter, OrderedDict

from peft_dist.core.adapter import AdapterSpec


class AdapterManager:
    """Assigns device slots to adapters, identified by content hash.

    A slot stays with its adapter while any running request uses it. Unused adapters stay resident until
    their slot is needed, least recently used first. Changes of slots are collected here and carried out by
    the engine, in order with the batches.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._changes: list[tuple[int, AdapterSpec | None]] = []
        self._discards: list[str] = []
        self._slot_of: dict[str, int] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self._running: Counter[str] = Counter()
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._users: Counter[str] = Counter()
        self._leaving: set[str] = set()

    @property
    def resident(self) -> list[str]:
        """Content hashes on the device."""
        return list(self._slot_of)

    def add_user(self, spec: AdapterSpec) -> None:
        """A request for this adapter was admitted; it may wait before it runs."""
        self._users[spec.content_hash] += 1

    def remove_user(self, spec: AdapterSpec) -> None:
        """A request for this adapter ended."""
        key = spec.content_hash
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            if key in self._leaving:
                self._drop(key)

    def acquire(self, spec: AdapterSpec) -> int | None:
        """Slot for one more running request; None while every slot is used by running requests."""
        key = spec.content_hash
        slot = self._slot_of.get(key)
        if slot is None:
            slot = self._make_room()
            if slot is None:
                return None
            self._slot_of[key] = slot
            self._changes.append((slot, spec))
        self._running[key] += 1
        self._idle.pop(key, None)
        return slot

    def release(self, spec: AdapterSpec) -> None:
        """A running request stopped running: it ended or was preempted."""
        key = spec.content_hash
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
            self._idle[key] = None

    def slot(self, spec: AdapterSpec) -> int:
        return self._slot_of[spec.content_hash]

    def keep(self, content_hash: str) -> None:
        """An adapter was registered, perhaps again while its last requests were running out."""
        self._leaving.discard(content_hash)

    def forget(self, content_hash: str) -> None:
        """Drop an adapter once no request needs it any more."""
        if self._users[content_hash]:
            self._leaving.add(content_hash)
        else:
            self._drop(content_hash)

    def take_changes(self) -> list[tuple[int, AdapterSpec | None]]:
        """Slots to fill with an adapter or, where it is None, to clear; in order, each given out once."""
        changes, self._changes = self._changes, []
        return changes

    def take_discards(self) -> list[str]:
        """Content hashes that nobody needs any more, each given out once."""
        discards, self._discards = self._discards, []
        return discards

    def check(self) -> None:
        """Raise AssertionError unless every slot is owned once."""
        slots = list(self._slot_of.values())
        assert sorted(slots + self._free) == list(range(self.num_slots)), "slots"
        assert self._running.keys() | self._idle.keys() == self._slot_of.keys(), "resident adapters"
        assert not self._running.keys() & self._idle.keys(), "an adapter both running and idle"
        assert all(self._users[key] >= count > 0 for key, count in self._running.items()), "users"

    def _make_room(self) -> int | None:
        if self._free:
            return self._free.pop()
        if not self._idle:
            return None
        key, _ = self._idle.popitem(last=False)
        return self._slot_of.pop(key)

    def _drop(self, key: str) -> None:
        self._leaving.discard(key)
        self._discards.append(key)
        slot = self._slot_of.pop(key, None)
        if slot is not None:
            self._idle.pop(key, None)
            self._free.append(slot)
            self._changes.append((slot, None))
