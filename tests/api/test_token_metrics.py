"""Metrics of each token look as ``prometheus_client`` has metrics look."""

from __future__ import annotations

import re
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from peft_dist.api.token_metrics import TokenCounter, TokenHistogram

BOUNDS = (0.001, 0.5, 1, 10)


def shown(*metrics: Any, registry: CollectorRegistry | None = None) -> str:
    """Without the moments at which they were made."""
    registry = registry or CollectorRegistry()
    for metric in metrics:
        registry.register(metric)
    return re.sub(r"(_created) .*", r"\1", generate_latest(registry).decode())


def test_they_are_shown_alike() -> None:
    theirs = CollectorRegistry()
    counters = [TokenCounter("a:tokens", "Some."), Counter("a:tokens", "Some.", registry=theirs)]
    histograms = [
        TokenHistogram("a:seconds", "Long.", BOUNDS),
        Histogram("a:seconds", "Long.", (), buckets=BOUNDS, registry=theirs),
    ]
    assert shown(counters[0], histograms[0]) == shown(registry=theirs)
    for number in (1, 3):
        for counter in counters:
            counter.inc(number)
    # On a bound, between two, beyond the last.
    for value in (0.0, 0.001, 0.25, 1.0, 3.0, 11.0):
        for histogram in histograms:
            histogram.observe(value)
    assert shown(counters[0], histograms[0]) == shown(registry=theirs)
