"""What came of moving running requests to other replicas."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, deque
from collections.abc import Mapping

from peft_dist.orchestrator.observation import MOVE_SECONDS, MovesView

# Moves whose seconds are kept one by one.
NUM_KEPT = 4096
PLAN, DRAIN, CALL = "plan", "drain", "call"
"""Why a request moves."""


class MoveCounts:
    """Counts live moves by why, how and with what end; nothing is counted before its end is known.

    A move in the way "kv" ends as "moved", "recomputed" (there, or where it had to flee to), "stayed" (where it was),
    "lost" (with its source) or "ended" (the request, meanwhile); one in the way "recompute" as "moved", at once.
    """

    def __init__(self) -> None:
        self._ends: Counter[tuple[str, str, str]] = Counter()
        self._num_bytes: Counter[str] = Counter()
        self._seconds = [0] * (len(MOVE_SECONDS) + 1)
        self._sum_seconds = 0.0
        self._latest: deque[float] = deque(maxlen=NUM_KEPT)

    def recompute(self, cause: str) -> None:
        """A request was sent elsewhere without its KV, as was meant."""
        self._ends[cause, "recompute", "moved"] += 1

    def bring(self, cause: str, num_bytes: Mapping[str, int], seconds: float) -> None:
        """A request has moved with so many bytes of KV, by memory, so long after it was asked to."""
        self._ends[cause, "kv", "moved"] += 1
        self._num_bytes.update(num_bytes)
        self._seconds[bisect.bisect_left(MOVE_SECONDS, seconds)] += 1
        self._sum_seconds += seconds
        self._latest.append(seconds)

    def fail(self, cause: str, outcome: str) -> None:
        """A request that was to move with its KV did not."""
        self._ends[cause, "kv", outcome] += 1

    def latest(self, number: int) -> list[float]:
        """Seconds of the last so many requests that moved with their KV, oldest first; not more than ``NUM_KEPT``."""
        return list(itertools.islice(self._latest, max(0, len(self._latest) - number), None))

    def view(self) -> MovesView:
        return MovesView(dict(self._ends), dict(self._num_bytes), tuple(self._seconds), self._sum_seconds)
