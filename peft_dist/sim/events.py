"""Virtual time: what happens next, and when."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable

Action = Callable[[], None]
OUTSIDE = 1 << 30
"""The lane of what is no replica's doing. Lanes below are those of what ends on replicas at the same time, and of what
they report; those above of what begins there, with all that has come by then."""


class EventQueue:
    """Actions in the order of their times.

    Those of one time come by lane, and within a lane in the order in which they were asked for: so that the order does
    not depend on how many events somebody else needed to get there.

    Attributes:
        now: Seconds, the time of the action that runs or ran last.
        lane: Its lane.
        num_run: Actions that have run.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.lane = OUTSIDE
        self._heap: list[tuple[float, int, int, Action]] = []
        self.num_run = 0
        self._is_over = False
        self._order = itertools.count()

    def at(self, time: float, action: Action, lane: int = OUTSIDE) -> None:
        """Have an action run at a time; one that has passed is now."""
        now = self.now
        heapq.heappush(self._heap, (time if time > now else now, lane, next(self._order), action))

    @property
    def next_time(self) -> float:
        """When the next action runs; infinity for never."""
        return self._heap[0][0] if self._heap else math.inf

    def run(self, is_over: Callable[[], bool] | None = None) -> None:
        """Run actions until there are none, one has called ``stop``, or it is over, which is asked before each."""
        heap, pop = self._heap, heapq.heappop
        self._is_over = False
        while heap and not self._is_over:
            if is_over is not None and is_over():
                return
            self.now, self.lane, _, action = pop(heap)
            self.num_run += 1
            action()

    def stop(self) -> None:
        """Let no further action run."""
        self._is_over = True
