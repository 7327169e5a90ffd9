"""What the runs of bench_policies.py say: means, paired differences, intervals, a table and a picture."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond, the last is a little too wide.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)

Run = dict[str, Any]


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean of paired differences, and the half width of its 95 % interval (infinite for a single pair)."""
    n = len(differences)
    if n < 2:
        return differences[0], math.inf
    return statistics.fmean(differences), T95[min(n - 1, len(T95)) - 1] * statistics.stdev(differences) / math.sqrt(n)


def summarise(runs: list[Run]) -> list[dict[str, Any]]:
    """One row for each skew and measure: each policy's mean, and how `credit` does against the better other."""
    rows = []
    for skew in dict.fromkeys(run["skew"] for run in runs):
        for measure in ("mean", "p90"):
            values = {
                policy: {run["seed"]: run[measure] for run in runs if run["skew"] == skew and run["policy"] == policy}
                for policy in ("fcfs", "merge", "credit")
            }
            means = {policy: statistics.fmean(by_seed.values()) for policy, by_seed in values.items()}
            better = min(("fcfs", "merge"), key=means.__getitem__)
            pairs = [(values["credit"][seed], values[better][seed]) for seed in values["credit"]]
            difference, half = interval([ours / other - 1 for ours, other in pairs])
            rows.append(
                {
                    "skew": skew,
                    "measure": measure,
                    **means,
                    "better": better,
                    "credit_less_better": difference,
                    "half_width": half,
                    "significantly_worse": difference - half > 0,
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| skew | s/token | fcfs | merge | credit | credit against the better |", "|---|---|---|---|---|---|"]
    for row in rows:
        against = f"{row['credit_less_better']:+.1%} ± {row['half_width']:.1%} of {row['better']}"
        times = " | ".join(f"{row[policy]:.4f}" for policy in ("fcfs", "merge", "credit"))
        lines.append(f"| {row['skew']} | {row['measure']} | {times} | {against} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the mean seconds per token by skew and policy, written as an SVG."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["measure"] == "mean"]
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for number, policy in enumerate(("fcfs", "merge", "credit")):
        places = [index + (number - 1) * 0.27 for index in range(len(shown))]
        axes.bar(places, [row[policy] for row in shown], 0.25, label=policy)
    axes.set_xticks(range(len(shown)), [row["skew"] for row in shown])
    axes.set_ylabel("mean s/token")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
