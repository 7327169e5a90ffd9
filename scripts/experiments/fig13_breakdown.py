"""Figure 13: what part of a run dLoRA's switches and plans take.

    python scripts/experiments/fig13_breakdown.py [--output figures]

From fig11a.csv, which fig11a_migration.py writes: switching on the replica that switches longest, all plans, and the
rest, over the time of the run; of dLoRA in its artifact's form, as it serves here, and of the modern systems that the
paper lacks (moves with KV; grouped kernels, merged with corrections and never merged). Plans are made beside the
replicas' work: nothing waits for them. In a simulation each is assumed to take the same time, as fig11a.json says.
Writes fig13.csv, fig13.json and figure13.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
import argparse
from collections.abc import Mapping
from typing import Any

from experiments import authors, drawing
from experiments.systems import SYSTEMS
from experiments.tables import Row, read_csv, read_json, write_csv, write_json

COLUMNS = ("rate", "solver", "switching", "inference")
# What fig11a.json tells that is true of this figure too.
KEPT = ("scale", "seed", "data", "correlated", "rate_factor", "max_total", "versions", "servers")
SHOWN = ("dlora-artifact", "dlora", "kv", "corrected", "grouped")
_COLORS = {"inference": "tab:green", "switching": "tab:orange", "solver": "tab:blue"}


def breakdown(rows: list[Row]) -> list[Row]:
    """Per cent of a run's time, by system and rate, of the rows of ``SHOWN``."""
    found = []
    own = [row for row in rows if row["system"] in SHOWN]
    for row in sorted(own, key=lambda row: (SHOWN.index(row["system"]), row["rate"])):
        solver, switching = (100 * row[name] / row["tot_time"] for name in ("solver_time", "adjust_time"))
        shares = {"rate": row["rate"], "solver": solver, "switching": switching, "inference": 100 - solver - switching}
        what = {"system": row["system"], "form": SYSTEMS[row["system"]].form, "mode": row["mode"]}
        found.append(shares | what | {"units": "rate=requests/s solver=% switching=% inference=%"})
    return found


def assumed(before: Mapping[str, Any]) -> float | None:
    """Seconds that every plan of these simulations was taken to last; None: plans were measured."""
    seconds = {one["options"]["plan_seconds"] for one in before.get("systems", {}).values()}
    return max(seconds) if seconds else None


def draw(folder: Path) -> None:
    """A panel of bars for each system, of one scale."""
    rows = read_csv(folder / "fig13.csv")
    seconds = read_json(folder / "fig13.json").get("assumed_plan_seconds")
    words = dict(zip(_COLORS, _COLORS, strict=True))
    if seconds is not None:
        words["solver"] = f"plans, {seconds:g} s each: assumed, not measured"
    names = list(dict.fromkeys(row["system"] for row in rows))
    drawn = drawing.figure(2.2 * max(2, len(names)), 2.8)
    lowest = min((row["inference"] for row in rows), default=90.0) - 1
    panels = []
    for number, name in enumerate(names, 1):
        panels.append(axes := drawn.add_subplot(1, len(names), number))
        own = [row for row in rows if row["system"] == name]
        below = [0.0] * len(own)
        for part, color in _COLORS.items():
            heights = [row[part] for row in own]
            axes.bar(range(len(own)), heights, 0.7, below, label=words[part], color=color)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        axes.set_xticks(range(len(own)), [f"{row['rate']:g}" for row in own], fontsize=7)
        axes.set_title(SYSTEMS[name].label.replace(", ", ",\n"), fontsize=7)
        axes.set(xlabel="requests/s", ylabel="time (%)" if number == 1 else "", ylim=(lowest, 100))
    drawing.legend(drawn, panels)
    drawing.save(drawn, folder, "figure13", ["fig13"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("figures"), metavar="DIR")
    folder = parser.parse_args().output
    rows = breakdown(read_csv(folder / "fig11a.csv"))
    if not rows:
        raise SystemExit(f"{folder / 'fig11a.csv'} has no rows of {', '.join(SHOWN)}: run fig11a_migration.py first")
    write_csv(folder / "fig13.csv", COLUMNS, rows)
    known = {rate: [switching, solver, total] for rate, (switching, solver, total) in authors.FIGURE13.items()}
    before = read_json(folder / "fig11a.json")
    about = {"figure": "13", "from": "fig11a.csv", "mode": rows[0]["mode"]}
    about |= {key: before[key] for key in KEPT if key in before}
    if (seconds := assumed(before)) is not None:
        about["assumed_plan_seconds"] = seconds
    write_json(folder / "fig13.json", about | {"authors": known})
    draw(folder)


if __name__ == "__main__":
    main()
