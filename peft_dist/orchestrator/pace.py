"""How fast sequences end, for telling a refused client when to come back."""

from __future__ import annotations

_WEIGHT = 0.1
_SHORTEST, _LONGEST = 1.0, 60.0


class Pace:
    """A moving average of the time between two ends of sequences while the system was busy."""

    def __init__(self) -> None:
        self._interval: float | None = None
        self._last: float | None = None

    def ended(self, now: float) -> None:
        """Note that a sequence ended at ``now``, in seconds of a monotonic clock."""
        if self._last is not None:
            gap = max(now - self._last, 0.0)
            self._interval = gap if self._interval is None else self._interval + _WEIGHT * (gap - self._interval)
        self._last = now

    def idle(self) -> None:
        """Nothing runs: the time until the next end says nothing about the pace."""
        self._last = None

    def seconds_for(self, num_sequences: int) -> float:
        """Whole seconds (1 to 60) until about so many sequences have ended."""
        guess = _SHORTEST if self._interval is None else self._interval * num_sequences
        return float(round(min(max(guess, _SHORTEST), _LONGEST)))
