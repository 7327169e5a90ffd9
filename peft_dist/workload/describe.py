"""What a workload looks like: a table, and a picture."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_dist.core.errors import ConfigError
from peft_dist.workload.arrivals import Workload
from peft_dist.workload.records import Distribution

BASE = "(base model)"
_BINS = 60


@dataclass(frozen=True, slots=True)
class Description:
    """Figures of a workload.

    Attributes:
        rate: Requests a second until the last arrival.
        cv: Coefficient of variation of the gaps between requests of all adapters; None: too few.
        adapter_cv: The same of one adapter's gaps: mean over those with at least 10 requests; None: there are none.
        requests: By adapter, the most asked for first.
    """

    rate: float
    duration: float
    cv: float | None
    adapter_cv: float | None
    requests: dict[str, int]
    prompt_tokens: Distribution
    output_tokens: Distribution


def describe(workload: Workload) -> Description:
    """Raises ConfigError for a workload without requests."""
    prompt = Distribution.of(arrival.prompt_tokens for arrival in workload.arrivals)
    output = Distribution.of(arrival.output_tokens for arrival in workload.arrivals)
    if prompt is None or output is None:
        raise ConfigError("the workload has no request: there is nothing to describe")
    times: dict[str, list[float]] = {}
    for arrival in workload.arrivals:
        times.setdefault(arrival.adapter or BASE, []).append(arrival.time)
    cvs = [cv for own in times.values() if len(own) >= 10 and (cv := _cv(own)) is not None]
    return Description(
        rate=len(workload.arrivals) / workload.duration if workload.duration else math.inf,
        duration=workload.duration,
        cv=_cv([arrival.time for arrival in workload.arrivals]),
        adapter_cv=float(np.mean(cvs)) if cvs else None,
        requests=dict(Counter({name: len(own) for name, own in times.items()}).most_common()),
        prompt_tokens=prompt,
        output_tokens=output,
    )


def _cv(times: list[float]) -> float | None:
    gaps = np.diff(times)
    return float(gaps.std() / gaps.mean()) if len(gaps) > 1 and gaps.mean() > 0 else None


def table(workload: Workload, most_adapters: int = 10) -> str:
    """Lines of text for people."""
    found = describe(workload)
    total = sum(found.requests.values())
    lines = [f"{key + ':':<16}{value}" for key, value in workload.source.items()]
    lines.append(f"{total} requests in {found.duration:.1f} s: {found.rate:.3g} a second")
    lines.append(f"cv of the gaps: {_number(found.cv)}, of one adapter's: {_number(found.adapter_cv)}")
    lines += ["", f"{'tokens':<12}{'mean':>10}{'P50':>10}{'P90':>10}{'P99':>10}"]
    for name, values in (("prompt", found.prompt_tokens), ("output", found.output_tokens)):
        numbers = (values.mean, values.p50, values.p90, values.p99)
        lines.append(f"{name:<12}" + "".join(f"{number:>10.1f}" for number in numbers))
    lines += ["", f"{'adapter':<24}{'requests':>10}{'share':>9}"]
    shown = list(found.requests.items())[:most_adapters]
    lines += [f"{name:<24}{count:>10}{count / total:>9.1%}" for name, count in shown]
    if rest := len(found.requests) - len(shown):
        others = total - sum(count for _, count in shown)
        lines.append(f"{f'{rest} others':<24}{others:>10}{others / total:>9.1%}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def plot(workload: Workload, path: Path) -> None:
    """Requests over time, by adapter and by length, as SVG (PDF or PNG by the name); the same bytes every time.

    Needs matplotlib (the extra ``figures``).
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ConfigError("a picture needs matplotlib: pip install 'peft-dist[figures]'") from missing
    found = describe(workload)
    figure = Figure(figsize=(10, 3), layout="constrained")
    over_time, by_adapter, by_length = figure.subplots(1, 3)
    _plot_times(over_time, workload)
    by_adapter.plot(np.arange(1, len(found.requests) + 1), list(found.requests.values()), drawstyle="steps-mid")
    by_adapter.set(xlabel="adapters, most asked for first", ylabel="requests", ylim=(0, None))
    for name in ("prompt", "output"):
        values = [getattr(arrival, f"{name}_tokens") for arrival in workload.arrivals]
        by_length.hist(values, bins=_BINS, histtype="step", label=name)
    by_length.set(xlabel="tokens", ylabel="requests")
    by_length.legend(frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "peft-dist"}):
        try:
            figure.savefig(path, metadata=_undated(path))
        except (OSError, ValueError) as error:
            raise ConfigError(f"the picture {path} cannot be written: {error}") from error


def _plot_times(axes: Any, workload: Workload) -> None:
    edges = np.linspace(0, workload.duration or 1.0, _BINS + 1)
    counts, _ = np.histogram([arrival.time for arrival in workload.arrivals], edges)
    axes.stairs(counts / np.diff(edges), edges)
    axes.set(xlabel="seconds", ylabel="requests a second", ylim=(0, None))


def _undated(path: Path) -> dict[str, None]:
    return {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(path.suffix[1:].lower(), {})
