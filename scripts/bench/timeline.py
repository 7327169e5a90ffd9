"""What a device did in a window of recorded steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

Interval = tuple[str, float, float]
"""Name, start and end of something that ran, in microseconds."""

LEAST_GAP = 2.0
"""Shorter gaps are the device's own between two kernels."""


def busy_spans(intervals: Iterable[Interval]) -> list[tuple[float, float]]:
    """The union of all intervals: disjoint spans in order. Streams overlap, so times must not be added up."""
    spans: list[tuple[float, float]] = []
    for _, start, end in sorted(intervals, key=lambda interval: interval[1]):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((start, end))
    return spans


def summarise(intervals: list[Interval], steps: int, top: int = 25) -> dict[str, Any]:
    """Shares and gaps of the window from the first start to the last end, and the kernels that took most of it.

    Raises:
        ValueError: nothing was recorded.
    """
    if not intervals:
        raise ValueError("nothing was recorded: is another profiler attached to the device?")
    spans = busy_spans(intervals)
    window = spans[-1][1] - spans[0][0]
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(spans)]
    idle = sum(gaps)
    return {
        "recorded_step_ms": round(window / steps / 1e3, 4),
        "busy_share": round(1 - idle / window, 5),
        "idle_share": round(idle / window, 5),
        "idle_us_per_step": round(idle / steps, 2),
        "longest_gap_us": round(max(gaps, default=0.0), 2),
        "gaps_per_step": round(sum(gap > LEAST_GAP for gap in gaps) / steps, 2),
        "kernels_per_step": round(len(intervals) / steps, 1),
        "kernels": _by_name(intervals, steps, window)[:top],
    }


def _by_name(intervals: list[Interval], steps: int, window: float) -> list[dict[str, Any]]:
    totals: dict[str, list[float]] = {}
    for name, start, end in intervals:
        total = totals.setdefault(name, [0, 0.0])
        total[0] += 1
        total[1] += end - start
    rows = sorted(totals.items(), key=lambda row: -row[1][1])
    return [
        {
            "name": name,
            "us_per_step": round(us / steps, 2),
            "share": round(us / window, 4),
            "calls_per_step": round(count / steps, 3),
        }
        for name, (count, us) in rows
    ]
