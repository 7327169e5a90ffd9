"""What a device did in a window of recorded steps."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

Interval = tuple[str, float, float]
"""Name, start and end of something that ran, in microseconds."""

LEAST_GAP = 2.0
"""Up to this, a gap is the device's own between two kernels of a graph; above, the device waits for the host."""

MARK = "frac"
"""Part of the name of an operator, and of its kernel, that no model has: where a window begins and ends."""


def busy_spans(intervals: Iterable[Interval]) -> list[tuple[float, float]]:
    """The union of all intervals: disjoint spans in order. Streams overlap, so times must not be added up."""
    spans: list[tuple[float, float]] = []
    for _, start, end in sorted(intervals, key=lambda interval: interval[1]):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((start, end))
    return spans


def between_marks(intervals: Iterable[Interval]) -> tuple[list[Interval], float, float]:
    """What ran between the first mark and the last, and the times at which the one ended and the other started.

    Raises:
        ValueError: there are no two.
    """
    found = sorted(intervals, key=lambda interval: interval[1])
    marks = [interval for interval in found if MARK in interval[0]]
    if len(marks) < 2:
        raise ValueError(f"{len(marks)} marks were recorded, not 2: is another profiler attached to the device?")
    begin, end = marks[0][2], marks[-1][1]
    return [i for i in found if MARK not in i[0] and begin <= i[1] < end], begin, end


def summarise(intervals: Iterable[Interval], steps: int, top: int = 25) -> dict[str, Any]:
    """Shares and gaps of the window between the marks, which ``steps`` whole steps fill, and what took most of it.

    Raises:
        ValueError: the marks, or what is between them, were not recorded.
    """
    inside, begin, end = between_marks(intervals)
    if not inside:
        raise ValueError("nothing was recorded between the marks: is another profiler attached to the device?")
    spans = [(begin, begin), *busy_spans(inside), (end, end)]
    window = end - begin
    gaps = [max(after[0] - before[1], 0.0) for before, after in pairwise(spans)]
    waits = [gap for gap in gaps if gap > LEAST_GAP]
    launches = [gap for gap in gaps if 0 < gap <= LEAST_GAP]
    idle = sum(gaps)
    return {
        "recorded_step_ms": round(window / steps / 1e3, 4),
        "busy_share": round(1 - idle / window, 5),
        "idle_share": round(idle / window, 5),
        "idle_us_per_step": round(idle / steps, 2),
        "longest_gap_us": round(max(gaps), 2),
        "gap_share": round(sum(waits) / window, 5),
        "gaps_us_per_step": round(sum(waits) / steps, 2),
        "gaps_per_step": round(len(waits) / steps, 2),
        "launch_gap_share": round(sum(launches) / window, 5),
        "launch_gaps_us_per_step": round(sum(launches) / steps, 2),
        "launch_gaps_per_step": round(len(launches) / steps, 2),
        "kernels_per_step": round(len(inside) / steps, 1),
        "kernels": _by_name(inside, steps, window)[:top],
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
