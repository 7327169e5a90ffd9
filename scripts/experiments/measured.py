"""What came of one load: the figures that experiments plot, from records of a simulated or a live run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peft_dist.workload.arrivals import Workload
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
class Asked:
    """What was asked for.

    Attributes:
        active_adapters: Of how many adapters there was a request.
        largest_share: Of the requests, of the adapter with most.
        source: Where the workload comes from (``Workload.source``).
    """

    active_adapters: int
    largest_share: float
    source: Mapping[str, Any]

    @classmethod
    def of(cls, workload: Workload) -> Asked:
        counts = Counter(arrival.adapter for arrival in workload.arrivals)
        return cls(len(counts), max(counts.values()) / len(workload.arrivals), workload.source)


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds and shares of one run; latencies are of the requests that were answered.

    Attributes:
        avg_lat, p90_lat: Seconds a token of the answer, waiting included.
        queueing_delay: Seconds from arrival to the first step, a token of the answer (mean); None where not told.
        throughput: Requests a second.
        tot_time: From the first arrival to the last end.
        output_tokens: Mean of an answer.
        asked: What the figures are of; None where it is not told.
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
    asked: Asked | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """For the CSV, without what only one figure shows."""
        columns = {key: value for key, value in asdict(self).items() if key not in ("work", "asked")}
        counts = {key: value for key, value in asdict(self.work).items() if key != "queueing"}
        asked = {} if self.asked is None else asdict(self.asked)
        asked.pop("source", None)
        return columns | counts | asked


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
