"""What the runs of bench_balance.py say: a table and a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

Run = dict[str, Any]
_KINDS = ("rr", "proactive", "dlora")


def means(runs: list[Run], measure: str) -> dict[str, dict[float, float]]:
    """By kind and load, over the seeds."""
    return {
        kind: {
            load: statistics.fmean(r[measure] for r in runs if r["migration"] == kind and r["load"] == load)
            for load in sorted({r["load"] for r in runs if r["migration"] == kind})
        }
        for kind in _KINDS
        if any(r["migration"] == kind for r in runs)
    }


def table(runs: list[Run]) -> str:
    """Markdown; runs in which a replica died are apart."""
    died = [run for run in runs if "killed" in run]
    runs = [run for run in runs if "killed" not in run]
    queueing, tail, pace = (means(runs, m) for m in ("queueing_mean_ms", "queueing_p90_ms", "mean_s_per_token"))
    lines = ["| load | migration | queueing: mean, P90 (ms) | mean ms/token |", "|---|---|---|---|"]
    for load in sorted({r["load"] for r in runs}):
        for kind, found in queueing.items():
            lines.append(
                f"| {load:g} | {kind} | {found[load]:.0f}, {tail[kind][load]:.0f} | {1e3 * pace[kind][load]:.1f} |"
            )
    lines += [
        f"| {run['load']:g}, one killed | {run['migration']} "
        f"| {run['queueing_mean_ms']:.0f}, {run['queueing_p90_ms']:.0f} | {1e3 * run['mean_s_per_token']:.1f} |"
        for run in died
    ]
    return "\n".join(lines)


def plot(runs: list[Run], path: Path) -> None:
    """Mean queueing, and seconds per token, over the load; written as an SVG."""
    from matplotlib.figure import Figure

    runs = [run for run in runs if "killed" not in run]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for place, (measure, label, scale) in enumerate(
        (("queueing_mean_ms", "mean queueing (s)", 1e-3), ("mean_s_per_token", "mean s/token", 1.0)), 1
    ):
        axes = figure.add_subplot(1, 2, place)
        for kind, found in means(runs, measure).items():
            axes.plot(list(found), [scale * value for value in found.values()], marker="o", label=kind)
        axes.set_xlabel("load (1: what they answer of an even one)")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.savefig(path, metadata={"Date": None})
