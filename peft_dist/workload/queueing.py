"""How long requests waited in a server's queue, from its metrics: few servers tell it of each request."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from peft_dist.workload.records import RequestRecord

# Histograms of seconds in Prometheus' text format, ours first (which has vLLM's name too).
_METRICS = ("peft_dist:request_queue_seconds", "vllm:request_queue_time_seconds")


@dataclass(frozen=True, slots=True)
class ServerQueue:
    """Of all requests that a server began during a run, those of other clients included.

    Attributes:
        metric: Where it comes from.
        requests: How many.
        seconds: That they waited together.
        share: Of the end-to-end time of the run's answered requests.
    """

    metric: str
    requests: int
    seconds: float
    share: float | None

    @classmethod
    def between(cls, before: str, after: str, records: Sequence[RequestRecord]) -> ServerQueue | None:
        """What changed between two readings of the metrics; None where they tell of no request."""
        for metric in _METRICS:
            begun, seconds = (
                _total(after, f"{metric}_{part}") - _total(before, f"{metric}_{part}") for part in ("count", "sum")
            )
            if begun > 0:
                e2e = sum(record.e2e for record in records if record.error is None)
                return cls(metric, round(begun), seconds, seconds / e2e if e2e > 0 else None)
        return None


def _total(text: str, name: str) -> float:
    """Sum over all labels; 0 where there is no such line."""
    return sum(map(float, re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)", text, re.MULTILINE)))
