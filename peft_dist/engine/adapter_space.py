"""The device's room for adapters: slots, and in every module pages of rank rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from peft_dist.core.adapter import AdapterSpec


@dataclass(frozen=True, slots=True)
class Lease:
    """What one adapter occupies.

    Attributes:
        pages: Number of pages by module path; empty where pages are not counted.
    """

    spec: AdapterSpec
    slot: int
    pages: dict[str, int]

    def takes(self, key: str) -> int:
        """Pages in a module; under the empty name, slots."""
        return self.pages.get(key, 0) if key else 1


class AdapterSpace:
    """Counts slots and pages as the LoRA pool does, so that what fits here fits there."""

    def __init__(self, num_slots: int, page_rows: int, num_rows: int | None) -> None:
        """Every module has ``num_rows`` rows in pages of ``page_rows``; None: as many as anyone asks for."""
        self.num_slots = num_slots
        self.page_rows = page_rows
        self.num_pages = None if num_rows is None else num_rows // page_rows
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._used: Counter[str] = Counter()

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def find_excess(self, spec: AdapterSpec, beside: Iterable[AdapterSpec] = ()) -> str | None:
        """In what the adapter is larger than the device with nothing on it but ``beside``; None when it is not."""
        if self.num_pages is None:
            return None
        taken = self._sum(beside)
        # Where it lacks most; what is taken where it has no rows is no matter.
        module, needed = max(self._pages(spec).items(), key=lambda item: item[1] + taken[item[0]])
        if needed + taken[module] <= self.num_pages:
            return None
        rest = f", of which pinned adapters take {taken[module]}" if taken[module] else ""
        return (
            f"has rank {spec.ranks[module]} in {module}, which takes {needed} pages of {self.page_rows} rows, but the "
            f"device has room for {self.num_pages} pages a module{rest}"
        )

    def find_full(self, specs: Collection[AdapterSpec]) -> str | None:
        """Why these together leave no slot, or no page in one of their modules; None when they leave one of each."""
        if len(specs) >= self.num_slots:
            return (
                f"{len(specs)} pinned adapters leave none of the {self.num_slots} slots to others: unpin one, or raise "
                "max_loras (--max-loras)"
            )
        full = self.num_pages is not None and next(
            (module for module, count in self._sum(specs).items() if count >= self.num_pages), None
        )
        if not full:
            return None
        return (
            f"{len(specs)} pinned adapters leave none of the {self.num_pages} pages of {self.page_rows} rank rows in "
            f"{full} to others: unpin one, or raise adapter_device_memory (--adapter-device-memory)"
        )

    def find_least_room(self, specs: Iterable[AdapterSpec]) -> int | None:
        """Pages that these leave in every module; None: as many as anyone asks for."""
        return None if self.num_pages is None else self.num_pages - max(self._sum(specs).values(), default=0)

    def pages_of(self, rank: int) -> int:
        return -(-rank // self.page_rows)

    def victims(self, spec: AdapterSpec, evictable: Sequence[Lease]) -> list[Lease] | None:
        """Which leases must end so that the adapter fits; None when all of ``evictable`` are not enough.

        The first of them go first, and none that the adapter could do without.
        """
        lacking = self._lacking(spec)
        freed: Counter[str] = Counter()
        chosen: list[Lease] = []
        for lease in evictable:
            if _covers(freed, lacking):
                break
            if any(lease.takes(key) for key in lacking if freed[key] < lacking[key]):
                chosen.append(lease)
                freed.update({key: lease.takes(key) for key in lacking})
        if not _covers(freed, lacking):
            return None
        # One that was chosen early may have become needless through a larger one that was chosen later.
        for lease in chosen[::-1]:
            rest = {key: count - lease.takes(key) for key, count in freed.items()}
            if _covers(rest, lacking):
                chosen.remove(lease)
                freed = Counter(rest)
        return chosen

    def take(self, spec: AdapterSpec) -> Lease:
        """Room for an adapter that fits."""
        lease = Lease(spec, self._free_slots.pop(), self._pages(spec))
        self._used.update(lease.pages)
        return lease

    def give_back(self, lease: Lease) -> None:
        self._free_slots.append(lease.slot)
        self._used.subtract(lease.pages)

    def check(self, leases: Sequence[Lease]) -> None:
        """Raise AssertionError unless these leases and nothing else is taken."""
        slots = [lease.slot for lease in leases]
        assert sorted(slots + self._free_slots) == list(range(self.num_slots)), "slots"
        used: Counter[str] = Counter()
        for lease in leases:
            used.update(lease.pages)
        assert +used == +self._used, "pages"
        assert self.num_pages is None or all(count <= self.num_pages for count in used.values()), "too many pages"

    def _pages(self, spec: AdapterSpec) -> dict[str, int]:
        if self.num_pages is None:
            return {}
        return {module: self.pages_of(rank) for module, rank in spec.ranks.items()}

    def _sum(self, specs: Iterable[AdapterSpec]) -> Counter[str]:
        taken: Counter[str] = Counter()
        for spec in specs:
            taken.update(self._pages(spec))
        return taken

    def _lacking(self, spec: AdapterSpec) -> dict[str, int]:
        """Pages by module, and slots under the empty name, that are not free and would have to be."""
        lacking = {} if self._free_slots else {"": 1}
        if self.num_pages is not None:
            for module, count in self._pages(spec).items():
                if (lack := self._used[module] + count - self.num_pages) > 0:
                    lacking[module] = lack
        return lacking


def _covers(freed: Mapping[str, int], lacking: Mapping[str, int]) -> bool:
    return all(freed.get(key, 0) >= count for key, count in lacking.items())
