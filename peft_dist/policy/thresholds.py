"""When to merge and when to stay merged: two thresholds, tuned by what would have been."""

from __future__ import annotations

from dataclasses import dataclass

from peft_dist.policy.settings import PolicySettings


@dataclass(slots=True)
class Period:
    """What merging and not merging would each have done since the mode last changed: requests served, and seconds."""

    merge_requests: float = 0.0
    merge_seconds: float = 0.0
    unmerge_requests: float = 0.0
    unmerge_seconds: float = 0.0

    @property
    def gain(self) -> float:
        """Merging's requests per second less those of not merging; 0 when nothing was counted."""
        if not (self.merge_seconds > 0 and self.unmerge_seconds > 0):
            return 0.0
        return self.merge_requests / self.merge_seconds - self.unmerge_requests / self.unmerge_seconds


class ThresholdTuner:
    """The thresholds alpha (enter a merged period) and beta (stay in it) of dLoRA (OSDI'24), as shares of the
    first-come batch, beta <= alpha always.

    When a period ends, its mode either proved faster than the other one would have been: then a threshold moves one
    step, so that this mode is taken more readily the next time. Or it proved slower: then the threshold backs off by
    a factor. A merged period tunes alpha, an unmerged one beta.
    """

    def __init__(self, settings: PolicySettings) -> None:
        self.settings = settings
        self.alpha = settings.alpha
        self.period = Period()
        self._beta = settings.beta

    def beta(self, speed_ratio: float) -> float:
        """``speed_ratio``, predicted merged over unmerged seconds of a step, is the value until a period has ended."""
        return min(speed_ratio if self._beta is None else self._beta, self.alpha)

    def record(self, merge_requests: int, unmerge_requests: int, merge_seconds: float, unmerge_seconds: float) -> None:
        """One step: requests that either mode would have run, and the predicted seconds of either."""
        self.period.merge_requests += merge_requests
        self.period.merge_seconds += merge_seconds
        self.period.unmerge_requests += unmerge_requests
        self.period.unmerge_seconds += unmerge_seconds

    def record_again(
        self, merge_requests: int, unmerge_requests: int, merge_seconds: float, unmerge_seconds: float, count: int
    ) -> None:
        """As so many calls of ``record``: sums of floats in the same order."""
        period = self.period
        period.merge_requests += count * merge_requests
        period.unmerge_requests += count * unmerge_requests
        merged, unmerged = period.merge_seconds, period.unmerge_seconds
        for _ in range(count):
            merged += merge_seconds
            unmerged += unmerge_seconds
        period.merge_seconds, period.unmerge_seconds = merged, unmerged

    def virtual_switch(self, seconds: float) -> None:
        """While unmerged, merging would have changed its adapter."""
        self.period.merge_seconds += seconds

    def end_period(self, merged: bool, switch_seconds: float, speed_ratio: float) -> None:
        """The mode changes. The period, ``merged`` or not, had begun with a switch."""
        period, self.period = self.period, Period()
        if merged:
            period.merge_seconds += switch_seconds
        else:
            period.unmerge_seconds += switch_seconds
        beta, add, mul = self.beta(speed_ratio), self.settings.aimd_add, self.settings.aimd_mul
        if merged and period.gain > 0 and self.alpha - add > beta:
            self.alpha -= add
        elif merged and period.gain < 0:
            self.alpha = min(self.alpha * mul, self.settings.max_alpha)
        elif not merged and period.gain < 0 and beta + add < self.alpha:
            beta += add
        elif not merged and period.gain > 0:
            beta /= mul
        self._beta = beta
