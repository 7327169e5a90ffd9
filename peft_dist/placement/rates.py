"""How often each adapter is asked for, and for how much, the past counting less and less."""

from __future__ import annotations

import math
from collections.abc import Iterable

from peft_dist.core.errors import ConfigError


class ArrivalRates:
    """Requests a second and seconds of work a request, by adapter; both forget with a half-life.

    Before a half-life has passed the observed time is short of the kernel's: rates are what was seen over it, not an
    underestimate.
    """

    def __init__(self, half_life: float = 300.0, default_work: float = 1.0) -> None:
        """``half_life`` in seconds; ``default_work`` in seconds, for adapters of which no request has ended."""
        if not half_life > 0:
            raise ConfigError(f"half_life={half_life} of arrival rates must be above 0 seconds")
        self._decay = math.log(2) / half_life
        self._default_work = default_work
        self._start: float | None = None
        # By adapter: decayed count of arrivals, of finished requests, and of their seconds; and when that was.
        self._arrivals: dict[str, tuple[float, float]] = {}
        self._work: dict[str, tuple[float, float, float]] = {}

    def arrived(self, adapter: str, now: float) -> None:
        """A request of this adapter came."""
        self._begin(now)
        count, then = self._arrivals.get(adapter, (0.0, now))
        self._arrivals[adapter] = count * self._kept(then, now) + 1.0, now

    def finished(self, adapter: str, work: float, now: float) -> None:
        """A request of this adapter ended, having taken so many seconds of a replica."""
        count, seconds, then = self._work.get(adapter, (0.0, 0.0, now))
        kept = self._kept(then, now)
        self._work[adapter] = count * kept + 1.0, seconds * kept + work, now

    def forget(self, adapter: str) -> None:
        """The adapter is gone."""
        self._arrivals.pop(adapter, None)
        self._work.pop(adapter, None)

    def start(self, now: float) -> None:
        """Time in which nothing arrives counts from here on, not only from the first arrival."""
        self._begin(now)

    def rate(self, adapter: str, now: float) -> float:
        """Requests a second, 0 for an adapter never asked for."""
        if adapter not in self._arrivals or self._start is None:
            return 0.0
        count, then = self._arrivals[adapter]
        # What a steady rate of 1 would have counted by now; a second at least, or the first request is a flood.
        steady = -math.expm1(-self._decay * max(now - self._start, 1.0)) / self._decay
        return count * self._kept(then, now) / steady

    def work(self, adapter: str) -> float:
        """Mean seconds of a replica that a request takes."""
        count, seconds, _ = self._work.get(adapter, (0.0, 0.0, 0.0))
        return seconds / count if count else self._default_work

    def rates(self, adapters: Iterable[str], now: float) -> dict[str, float]:
        """``rate`` of each."""
        return {adapter: self.rate(adapter, now) for adapter in adapters}

    def _begin(self, now: float) -> None:
        if self._start is None:
            self._start = now

    def _kept(self, then: float, now: float) -> float:
        return math.exp(-self._decay * max(now - then, 0.0))
