"""When a worker tells what costs a walk over everything."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

# While steps run.
BUSY_SECONDS = 1.0
# Between two that tell of changes: a thousand adapters registered one after another are told of a few times.
CHANGE_SECONDS = 0.1


class DetailSchedule:
    """Once a second while steps run; and soon after the work ran out or an adapter came, went or moved.

    Times are seconds on the caller's clock.
    """

    def __init__(self) -> None:
        self._sent = -math.inf
        self._told_version = 0
        self._version = 0
        self._has_worked = False
        self._is_idle = True

    def note(self, *, stepped: bool, is_idle: bool, version: int) -> None:
        """What the loop sees after each round.

        Args:
            stepped: Whether the engine had something to do.
            is_idle: Whether there will be no further step before something happens.
            version: The engine's ``residency_version``.
        """
        self._has_worked |= stepped
        self._is_idle = is_idle
        self._version = version

    def is_due(self, now: float) -> bool:
        """Whether it is to be sent in this round, if only for its own sake."""
        wait = BUSY_SECONDS if not self._is_idle else CHANGE_SECONDS if self._has_news else math.inf
        return now >= self._sent + wait

    def pass_by(self, starts: Sequence[float]) -> bool:
        """Rounds with a step began at these times, of which nothing was sent; whether it was due in one of them. It is
        due again as if it had been sent."""
        index, was_due = 0, False
        while (index := bisect_left(starts, self.due_at, index)) < len(starts):
            self.sent(starts[index])
            was_due = True
        return was_due

    @property
    def due_at(self) -> float:
        """From when on a round with a step sends it."""
        return self._sent + BUSY_SECONDS

    def sent(self, now: float) -> None:
        self._sent = now
        self._told_version = self._version
        self._has_worked = False

    def timeout_ms(self, now: float) -> int | None:
        """For how long an idle loop may wait; None: until something happens."""
        if not self._has_news:
            return None
        return max(0, math.ceil((self._sent + CHANGE_SECONDS - now) * 1e3))

    @property
    def _has_news(self) -> bool:
        return self._has_worked or self._version != self._told_version
