"""Which pages of a layer's buffers are free."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence

import numpy as np


def page_table(pages: Sequence[Sequence[int]]) -> np.ndarray:
    """int64 ``[owners, most pages]``: those of each, and then zeros."""
    longest = max(map(len, pages), default=0)
    table = [[*own, *[0] * (longest - len(own))] for own in pages]
    return np.array(table, np.int64).reshape(len(pages), longest)


class PageAllocator:
    """Hands out pages 0 to ``capacity - 1``, the lowest free ones first.

    That keeps what is in use at the front of the buffers: pages that were never needed are never touched, and pages
    taken together are often neighbours.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = 0
        self._free: list[int] = []
        self.grow(capacity)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages in ascending order, or None when fewer are free."""
        if count > len(self._free):
            return None
        return [heapq.heappop(self._free) for _ in range(count)]

    def free(self, pages: Iterable[int]) -> None:
        """Take back pages that ``allocate`` gave."""
        for page in pages:
            heapq.heappush(self._free, page)

    def grow(self, capacity: int) -> None:
        """Add pages at the end up to ``capacity``."""
        if capacity > self.capacity:
            # Ascending and above all others, they may stand at the end of the heap.
            self._free.extend(range(self.capacity, capacity))
            self.capacity = capacity

    def find_inconsistency(self, owned: Sequence[int]) -> str | None:
        """What is wrong if the ``owned`` pages and the free ones are not each page once; else None."""
        held = sorted([*owned, *self._free])
        if held == list(range(self.capacity)):
            return None
        twice = sorted({a for a, b in itertools.pairwise(held) if a == b})
        lost = sorted(set(range(self.capacity)) - set(held))
        return f"of {self.capacity} pages {twice} are owned twice and {lost} by nobody"
