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
    keys = ("queueing_mean_ms", "queueing_p90_ms", "mean_s_per_token", "p90_s_per_token")
    queueing, *others = (means(runs, key) for key in keys)
    lines = [
        "| load | migration | queueing: mean, P90 (ms) | ms/token: mean, P90 | moved: with KV, computed again |",
        "|---|---|---|---|---|",
    ]
    for load in sorted({r["load"] for r in runs}):
        for kind, found in queueing.items():
            same = [run for run in runs if run["migration"] == kind and run["load"] == load]
            if same:
                figures = [found[load], *(other[kind][load] for other in others)]
                lines.append(_line(f"{load:g}", kind, figures, same))
    for run in died:
        lines.append(_line(f"{run['load']:g}, one killed", run["migration"], [run[key] for key in keys], [run]))
    return "\n".join(lines)


def _line(load: str, kind: str, figures: list[float], runs: list[Run]) -> str:
    queueing, tail, pace, slow = figures
    # Older results count from the start of the service.
    moved = [sum(run[key] for run in runs if key in run) for key in ("moved_with_kv", "moved_computed_again")]
    told = "{}, {}".format(*moved) if all("moved_with_kv" in run for run in runs) else "not told"
    return f"| {load} | {kind} | {queueing:.0f}, {tail:.0f} | {1e3 * pace:.1f}, {1e3 * slow:.1f} | {told} |"


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
