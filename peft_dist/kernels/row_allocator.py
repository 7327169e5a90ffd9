"""First-fit allocation of contiguous rows."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence


class RowAllocator:
    """Hands out contiguous ranges of ``capacity`` rows; neighbours that are free merge at once."""

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = 0
        self._free: list[tuple[int, int]] = []
        self.grow(capacity)

    @property
    def num_free(self) -> int:
        return sum(size for _, size in self._free)

    def allocate(self, size: int) -> int | None:
        """First row of the lowest free range of ``size`` rows, or None when no range is long enough."""
        for i, (first, length) in enumerate(self._free):
            if length >= size:
                self._free[i : i + 1] = [(first + size, length - size)] if length > size else []
                return first
        return None

    def free(self, first: int, size: int) -> None:
        """Take back rows that ``allocate`` gave."""
        insort(self._free, (first, size))
        merged: list[tuple[int, int]] = []
        for start, length in self._free:
            if merged and merged[-1][0] + merged[-1][1] == start:
                start, length = merged[-1][0], merged.pop()[1] + length
            merged.append((start, length))
        self._free = merged

    def grow(self, capacity: int) -> None:
        """Add rows at the end up to ``capacity``."""
        if capacity > self.capacity:
            first, self.capacity = self.capacity, capacity
            self.free(first, capacity - first)

    def find_inconsistency(self, owned: Sequence[tuple[int, int]]) -> str | None:
        """What is wrong if ``owned`` ranges (first, size) and the free ones do not tile the capacity; else None."""
        position = 0
        for first, size in sorted([*owned, *self._free]):
            if first != position or size < 1:
                return f"rows {position} to {first} are owned twice or by nobody"
            position = first + size
        return None if position == self.capacity else f"rows {position} to {self.capacity} are lost"
