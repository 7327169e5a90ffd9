"""Virtual time: what happens next, and when."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

Action = Callable[[], None]


class EventQueue:
    """Actions in the order of their times; those of one time in the order in which they were asked for.

    Attributes:
        now: Seconds, the time of the action that runs or ran last.
        num_run: Actions that have run.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.num_run = 0
        self._heap: list[tuple[float, int, Action]] = []
        self._order = itertools.count()

    def at(self, time: float, action: Action) -> None:
        """Have an action run at a time; one that has passed is now."""
        heapq.heappush(self._heap, (max(time, self.now), next(self._order), action))

    def run(self, is_over: Callable[[], bool]) -> None:
        """Run actions until there are none, or it is over."""
        heap = self._heap
        while heap and not is_over():
            self.now, _, action = heapq.heappop(heap)
            self.num_run += 1
            action()
