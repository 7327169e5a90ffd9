"""For how many steps a merge may be expected to last."""

from __future__ import annotations

from collections.abc import Collection, Iterable

# Share of the newest observation in a running mean, once there have been many.
RATE = 0.05
# Requests that the steps assumed at first are worth; leads that have to have ended before they say anything.
FEW = 4


class RunningMean:
    """Of all observations while they are few, of the last ones afterwards."""

    def __init__(self, value: float = 0.0, count: int = 0) -> None:
        self.value = value
        self.count = count

    def add(self, observed: float) -> None:
        self.count += 1
        self.value += max(RATE, 1.0 / self.count) * (observed - self.value)


class RequestSteps:
    """Running mean of the steps of ended requests, expected of every request again: nothing is known beforehand."""

    def __init__(self, assumed: float) -> None:
        self._mean = RunningMean(assumed, FEW)
        self._steps: dict[str, int] = {}

    @property
    def mean(self) -> float:
        return self._mean.value

    def left(self, request_ids: Collection[str]) -> float:
        """Steps that each of these is expected still to run, 1 at least, on average."""
        steps = (max(self.mean - self._steps.get(request_id, 0), 1.0) for request_id in request_ids)
        return sum(steps) / len(request_ids) if request_ids else self.mean

    def ran(self, request_ids: Iterable[str], count: int = 1) -> None:
        """So many steps had these in them."""
        steps = self._steps
        for request_id in request_ids:
            steps[request_id] = steps.get(request_id, 0) + count

    def ended(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            steps = self._steps.pop(request_id, 0)
            if steps:
                self._mean.add(steps)


class LeadSteps:
    """For how many steps on end one adapter has had so many requests that running merged on it pays.

    It is observed whether merged or not, so that a rule that no longer merges still learns when to begin again. With
    few requests about, an adapter leads now and then, but only until the next one of another arrives.

    Args:
        assumed: Steps that a lead lasts, until some have ended.
    """

    def __init__(self, assumed: float) -> None:
        self._assumed = assumed
        self._mean = RunningMean()
        self._leader: str | None = None
        self._steps = 0

    @property
    def mean(self) -> float:
        return self._mean.value if self._mean.count >= FEW else self._assumed

    def expected(self, adapter: str | None) -> float:
        """Steps to come, 1 at least: what the mean says, or as many as its lead has lasted already, if that is more."""
        return max(self.mean, self._steps if adapter == self._leader else 0, 1.0)

    def ran(self, leader: str | None, count: int = 1) -> None:
        """So many steps. ``leader``: for whom merging would have paid, or paid; None: for nobody."""
        if leader != self._leader:
            if self._leader is not None:
                self._mean.add(self._steps)
            self._leader, self._steps = leader, 0
        self._steps += count
