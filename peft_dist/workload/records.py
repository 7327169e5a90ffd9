"""What became of requests, and figures of all of them together: the only input of results and plots."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from peft_dist.core.errors import ConfigError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """Times and sizes of one request that has ended. Seconds from the start of the workload, on one clock.

    Attributes:
        index: Place in the workload.
        adapter: Name, or None for the base model.
        scheduled: When it was to be sent.
        sent: When it was sent; all latencies are measured from here.
        first_token: When its first token came; None: none did.
        finished: When its last event came, or it failed.
        prompt_tokens, output_tokens: As counted by the server, or as asked for where it does not tell.
        itl: Seconds between one event with tokens and the next; empty where nobody noted them.
        queueing: Seconds from its arrival at the server to its first step; None where the server does not tell.
        error: What failed; None: it was answered whole.
    """

    index: int
    adapter: str | None
    scheduled: float
    sent: float
    first_token: float | None
    finished: float
    prompt_tokens: int
    output_tokens: int
    itl: tuple[float, ...] = ()
    queueing: float | None = None
    error: str | None = None

    @property
    def e2e(self) -> float:
        """Seconds until the answer was complete."""
        return self.finished - self.sent

    @property
    def lateness(self) -> float:
        """Seconds by which the client missed its own schedule."""
        return self.sent - self.scheduled

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token."""
        return None if self.first_token is None else self.first_token - self.sent

    @property
    def normalized_latency(self) -> float:
        """Seconds a token of the answer, waiting included: the paper's measure. Infinite without a token."""
        return self.e2e / self.output_tokens if self.output_tokens else math.inf

    @property
    def tpot(self) -> float | None:
        """Mean seconds between two tokens; None for fewer than two."""
        if self.first_token is None or self.output_tokens < 2:
            return None
        return (self.finished - self.first_token) / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of ``count`` numbers; percentiles are interpolated linearly."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Distribution | None:
        """None for no value; None among them is left out."""
        known = np.array([value for value in values if value is not None], dtype=np.float64)
        if not known.size:
            return None
        p50, p90, p99 = (float(value) for value in np.percentile(known, (50, 90, 99)))
        return cls(known.size, float(known.mean()), p50, p90, p99)


@dataclass(frozen=True, slots=True)
class Objectives:
    """Most seconds that a request may take to count as served well; None: no bound.

    The paper's is 0.5 s a token.
    """

    normalized_latency: float | None = 0.5
    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def __post_init__(self) -> None:
        for name, bound in dataclasses.asdict(self).items():
            if bound is not None and not bound > 0:
                raise ConfigError(f"the objective {name}={bound}: it must be above 0 seconds, or left out")

    def met(self, record: RequestRecord) -> bool:
        """Whether it was answered, and within every bound."""
        if record.error is not None:
            return False
        bounds = dataclasses.asdict(self)
        values = {name: getattr(record, name) for name, bound in bounds.items() if bound is not None}
        return all(value is None or value <= bounds[name] for name, value in values.items())


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of one run. Seconds, and per second; distributions are of the requests that were answered.

    Attributes:
        requests, failed: All, and those of them that were not answered whole.
        duration: From the first request that was to be sent to the end of the last.
        request_throughput, prompt_throughput, output_throughput: Answered requests, and their tokens, a second.
        slo_attainment: Share of all requests that met ``objectives``; one that failed did not.
        goodput: Requests a second that did.
        queueing_share: Time in the queue over end-to-end time, of the requests of which both are known.
        lateness: How late requests were sent.
    """

    requests: int
    failed: int
    duration: float
    request_throughput: float
    prompt_throughput: float
    output_throughput: float
    normalized_latency: Distribution | None
    ttft: Distribution | None
    itl: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    queueing: Distribution | None
    queueing_share: float | None
    lateness: Distribution | None
    objectives: Objectives
    slo_attainment: float
    goodput: float


def summarize(records: Sequence[RequestRecord], objectives: Objectives | None = None) -> Summary:
    """Figures of these requests. Raises ConfigError for none."""
    if not records:
        raise ConfigError("there is no record to summarize")
    objectives = objectives or Objectives()
    answered = [record for record in records if record.error is None]
    duration = max(record.finished for record in records) - min(record.scheduled for record in records)
    waited = [(record.queueing, record.e2e) for record in answered if record.queueing is not None]
    met = sum(objectives.met(record) for record in records)
    e2e = sum(seconds for _, seconds in waited)

    def rate(amount: float) -> float:
        return amount / duration if duration > 0 else 0.0

    return Summary(
        requests=len(records),
        failed=len(records) - len(answered),
        duration=duration,
        request_throughput=rate(len(answered)),
        prompt_throughput=rate(sum(record.prompt_tokens for record in answered)),
        output_throughput=rate(sum(record.output_tokens for record in answered)),
        normalized_latency=Distribution.of(r.normalized_latency for r in answered if r.output_tokens),
        ttft=Distribution.of(record.ttft for record in answered),
        itl=Distribution.of(itertools.chain.from_iterable(record.itl for record in answered)),
        tpot=Distribution.of(record.tpot for record in answered),
        e2e=Distribution.of(record.e2e for record in answered),
        queueing=Distribution.of(queueing for queueing, _ in waited),
        queueing_share=sum(queueing for queueing, _ in waited) / e2e if e2e > 0 else None,
        lateness=Distribution.of(record.lateness for record in records),
        objectives=objectives,
        slo_attainment=met / len(records),
        goodput=rate(met),
    )


@dataclass(frozen=True, slots=True)
class Run:
    """Records, and what is known of where they come from: workload, server, settings."""

    records: tuple[RequestRecord, ...]
    source: dict[str, Any] = field(default_factory=dict)


def write_json(run: Run, path: Path, objectives: Objectives | None = None) -> None:
    """Source, summary and records, one record a line. Raises ConfigError when the file cannot be written."""
    summary = msgspec.json.encode(summarize(run.records, objectives)).decode()
    records = ",\n".join(msgspec.json.encode(record).decode() for record in run.records)
    head = f'"peft_dist_records": {FORMAT},\n"source": {json.dumps(run.source)},\n"summary": {summary}'
    _write(path, f'{{{head},\n"records": [\n{records}\n]}}\n')


# The gaps between tokens are as many as the tokens: only JSON holds them.
_COLUMNS = tuple(f.name for f in dataclasses.fields(RequestRecord) if f.name != "itl")
_DERIVED = ("e2e", "ttft", "normalized_latency", "tpot")


def write_csv(run: Run, path: Path) -> None:
    """A row for each record, below a line of ``#`` with the source as JSON. Without the gaps between tokens."""
    import io

    text = io.StringIO()
    text.write(f"# {json.dumps({'peft_dist_records': FORMAT, **run.source})}\n")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*_COLUMNS, *_DERIVED])
    for record in run.records:
        values = (getattr(record, name) for name in (*_COLUMNS, *_DERIVED))
        rows.writerow(["" if value is None else value for value in values])
    _write(path, text.getvalue())


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def read_json(path: Path) -> Run:
    """What ``write_json`` wrote. Raises ConfigError."""
    try:
        document = msgspec.json.decode(path.read_bytes())
        if not isinstance(document, dict) or document.get("peft_dist_records") != FORMAT:
            raise ConfigError(f"{path} holds no records of format {FORMAT}: write them with peft-dist bench")
        return Run(msgspec.convert(document["records"], tuple[RequestRecord, ...]), document["source"])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, KeyError) as error:
        raise ConfigError(f"{path} holds no records: {error}") from error
