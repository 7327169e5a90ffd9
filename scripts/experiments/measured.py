"""What came of one load: the figures that experiments plot, from records of a simulated or a live run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peft_dist.workload.records import Objectives, RequestRecord, summarize

# The paper's objective, seconds a token of the answer.
OBJECTIVE = 0.5


@dataclass(frozen=True, slots=True)
class Work:
    """What the servers did beside serving, in the run.

    Attributes:
        switch_seconds: Of weights, on the replica that switched longest (as the artifact sums it up).
        plan_seconds: Of all plans of what moves.
        queueing: Share of its requests' time that they waited, by replica.
        switches, loads: Of weights and of adapters, on all replicas.
        moved_with_kv, recomputed: Requests that moved, by how.
    """

    switch_seconds: float
    plan_seconds: float
    queueing: tuple[float, ...] = ()
    switches: int = 0
    loads: int = 0
    moved_with_kv: int = 0
    recomputed: int = 0


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds and shares of one run; latencies are of the requests that were answered.

    Attributes:
        avg_lat, p90_lat: Seconds a token of the answer, waiting included.
        queueing_delay: Seconds from arrival to the first step, a token of the answer (mean); None where not told.
        throughput: Requests a second.
        tot_time: From the first arrival to the last end.
        output_tokens: Mean of an answer.
    """

    avg_lat: float | None
    p90_lat: float | None
    queueing_delay: float | None
    throughput: float
    slo_attainment: float
    tot_time: float
    requests: int
    failed: int
    output_tokens: float
    work: Work

    @property
    def columns(self) -> dict[str, Any]:
        """For the CSV, without what only one figure shows."""
        columns = {key: value for key, value in asdict(self).items() if key != "work"}
        counts = {key: value for key, value in asdict(self.work).items() if key != "queueing"}
        return columns | counts


def measure(records: Sequence[RequestRecord], work: Work) -> Measured:
    """Figures of all requests of a run. Raises ConfigError for none."""
    summary = summarize(records, Objectives(OBJECTIVE))
    answered = [record for record in records if record.error is None and record.output_tokens]
    waits = [record.queueing / record.output_tokens for record in answered if record.queueing is not None]
    latency = summary.normalized_latency
    return Measured(
        avg_lat=None if latency is None else latency.mean,
        p90_lat=None if latency is None else latency.p90,
        queueing_delay=sum(waits) / len(waits) if waits else None,
        throughput=summary.request_throughput,
        slo_attainment=summary.slo_attainment,
        tot_time=summary.duration,
        requests=summary.requests,
        failed=summary.failed,
        output_tokens=sum(record.output_tokens for record in answered) / max(len(answered), 1),
        work=work,
    )
