"""Workloads put together: times and adapters from a trace or a distribution, and lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peft_dist.core.errors import ConfigError
from peft_dist.workload import arrivals
from peft_dist.workload.arrivals import Floats, Workload
from peft_dist.workload.lengths import Lengths
from peft_dist.workload.rows import BadRows
from peft_dist.workload.traces import Trace


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked for.

    Attributes:
        rate: Requests a second of all adapters together.
        count: Requests.
        cv: Of the gaps between an adapter's requests; 1 is a Poisson process.
        seed: Of everything that is random.
        correlated: All adapters share one sequence of gaps, as in the artifact (its seed is 0).
    """

    rate: float
    count: int
    cv: float = 1.0
    seed: int = 0
    correlated: bool = False

    def __post_init__(self) -> None:
        arrivals.check(self.rate, self.cv, self.seed)
        if self.count < 1:
            raise ConfigError(f"{self.count} requests: there must be at least 1")

    @property
    def source(self) -> dict[str, object]:
        """For headers."""
        streams = "correlated, as the artifact's" if self.correlated else "independent"
        return {"rate": self.rate, "cv": self.cv, "seed": self.seed, "streams": streams}


def from_shares(names: Sequence[str], shares: Floats, popularity: str, load: Load, lengths: Lengths) -> Workload:
    """Adapters whose shares of the requests never change. ``popularity``: in words, for headers."""
    times = arrivals.merged(shares, load.rate, load.count, cv=load.cv, seed=load.seed, correlated=load.correlated)
    source = {"arrivals": f"Gamma, {popularity} popularity", **_skipped(lengths.bad)}
    return _workload(times, names, load, lengths, source)


def from_trace(names: Sequence[str], trace: Trace, stride: int, load: Load, lengths: Lengths) -> Workload:
    """Adapters whose shares follow a trace from interval to interval, by the artifact's rules.

    Every interval gets an equal part of the requests, drawn at the whole rate from Gamma processes whose rates are
    proportional to the adapters' calls in it, and begins where the one before it ended: an hour is compressed into the
    seconds that its requests take. Of what the division leaves over (which the artifact drops) the first intervals get
    one more each; an interval without a call gets none.
    """
    calls = trace.by_adapter(len(names), stride)
    busy = [index for index in range(calls.shape[1]) if calls[:, index].any()]
    each, more = divmod(load.count, len(busy))
    times: list[tuple[float, int]] = []
    start = 0.0
    for place, index in enumerate(busy):
        count = each + (place < more)
        drawn = arrivals.merged(
            calls[:, index].astype(np.float64),
            load.rate,
            count,
            cv=load.cv,
            seed=load.seed,
            stream=index,
            correlated=load.correlated,
        )
        times.extend((start + time, adapter) for time, adapter in drawn)
        start = times[-1][0] if times else start
    source = {
        "arrivals": f"Gamma in intervals of a trace: {trace.source}",
        "stride": stride,
        "functions": len(trace.functions),
        "calls": int(trace.counts.sum()),
        **_skipped(trace.bad, lengths.bad),
        "intervals": len(busy),
    }
    return _workload(times, names, load, lengths, source)


def _skipped(*bad: BadRows) -> dict[str, object]:
    """How many rows were left out, and of which files, traces and lengths alike."""
    files = sum((Counter(one.files) for one in bad), Counter[str]())
    return {"skipped_rows": files.total()} | ({"skipped_by_file": dict(files)} if files else {})


def _workload(
    times: list[tuple[float, int]], names: Sequence[str], load: Load, lengths: Lengths, source: dict[str, object]
) -> Workload:
    source = {**source, "adapters": len(names), **load.source, "lengths": lengths.source}
    return Workload(arrivals.join(times, names, lengths.sample(len(times), load.seed)), source)
