"""Metrics of each token: changed on the event loop alone, and read anywhere.

Those of ``prometheus_client`` take a lock for each of their values, at several times the cost.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import Metric


class TokenCounter:
    """A counter without labels, as ``prometheus_client`` would show it."""

    def __init__(self, name: str, text: str) -> None:
        self._name, self._text, self._created = name, text, time.time()
        self._value = 0

    def inc(self, number: int) -> None:
        """So many more."""
        self._value += number

    def collect(self) -> Iterator[Metric]:
        """For a registry."""
        family = Metric(self._name, self._text, "counter")
        family.add_sample(f"{self._name}_total", {}, float(self._value))
        family.add_sample(f"{self._name}_created", {}, self._created)
        yield family


class TokenHistogram:
    """A histogram without labels, as ``prometheus_client`` would show it. ``bounds``: Of its buckets, rising."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._created = name, text, time.time()
        self._bounds = list(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """One more. On a bound it is in the bucket below."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        """For a registry."""
        family = Metric(self._name, self._text, "histogram")
        # The sum first: it may grow meanwhile, by what is then not counted yet.
        total, counts = self._sum, list(accumulate(self._counts))
        for bound, count in zip([*map(str, map(float, self._bounds)), "+Inf"], counts, strict=True):
            family.add_sample(f"{self._name}_bucket", {"le": bound}, float(count))
        family.add_sample(f"{self._name}_count", {}, float(counts[-1]))
        family.add_sample(f"{self._name}_sum", {}, total)
        family.add_sample(f"{self._name}_created", {}, self._created)
        yield family
