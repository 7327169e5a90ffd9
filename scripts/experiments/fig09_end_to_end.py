"""Figure 9: mean seconds a token under rising load, six panels: MAF1 and MAF2, Llama 2 of 7b, 13b and 70b.

    python scripts/experiments/fig09_end_to_end.py [--panels maf1_7b,maf2_70b] [--scale paper] [--data DIR] [--jobs 2]
    python scripts/experiments/fig09_end_to_end.py --panels maf1_7b --server http://HOST:8000 --systems dlora

7b and 13b: 32 replicas and 128 adapters; 70b: 8 replicas of 4 GPUs and 32 adapters; 100 s of requests at each of the
artifact's rates: dLoRA at its own, a baseline at all of them, up to the first one with a mean beyond twice the
picture's end (1 s/token). Writes fig9_PANEL.csv and .json for each panel, and figure9 of those that are there.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
import argparse

from experiments import authors, drawing
from experiments.experiment import Experiment, main
from experiments.loads import LoadSpec
from experiments.measured import OBJECTIVE, Measured
from experiments.points import Ladder, Point
from experiments.settings import Settings
from experiments.systems import SYSTEMS, System, chosen
from experiments.tables import Row, read_csv
from peft_dist.core.errors import ConfigError

SHOWN = ("vllm-artifact", "vllm", "peft-artifact", "peft", "dlora-artifact", "dlora", "kv", "grouped", "corrected")
PANELS = tuple(f"{trace}_{model}" for trace in ("maf1", "maf2") for model in ("7b", "13b", "70b"))
MOST = 1.0
SECONDS = 100
_FULL = tuple(range(8, 81, 8))
_LARGE = (2, 4, 6, 8, 10, 12, 16)
_LARGE_BASE = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8)
# The artifact's rates: of vLLM, of PEFT, and of dLoRA.
RATES: dict[str, tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]] = {
    "maf1_7b": ((2, 4, 6, 8, 10, 12), (1, 2, 4, 6, 8), _FULL),
    "maf2_7b": ((1, 2, 4, 6, 8, 10), (2, 4, 6, 8, 10, 12, 16, 20), _FULL),
    "maf1_13b": ((0.25, 0.5, 1, 1.5, 2, 3, 4), (0.5, 1, 2, 4, 6, 8), _FULL),
    "maf2_13b": ((0.25, 0.5, 1, 1.5, 2, 3), (1, 2, 4, 6, 8, 10, 12), _FULL),
    "maf1_70b": (_LARGE_BASE, _LARGE_BASE, _LARGE),
    "maf2_70b": (_LARGE_BASE, _LARGE_BASE, _LARGE),
}


def rates(panel: str, system: System) -> tuple[float, ...]:
    """Of a system, rising. A baseline goes on where the artifact's rates do not reach the objective."""
    vllm, peft, dlora = RATES[panel]
    return dlora if system.kind == "dlora" else tuple(sorted({*vllm, *peft, *dlora}))


def experiment(panel: str) -> Experiment:
    trace, model = panel.split("_")
    replicas, adapters = (8, 32) if model == "70b" else (32, 128)

    def ladders(settings: Settings) -> list[Ladder]:
        return [
            [
                settings.point(
                    system, model, replicas, LoadSpec(trace, "0.0.0-0.2.0", rate, round(SECONDS * rate), adapters)
                )
                for rate in settings.some(rates(panel, system))
            ]
            for system in chosen(SHOWN, settings.systems)
        ]

    known = authors.FIGURE9 if panel == "maf1_7b" else {}
    return Experiment(
        f"fig9_{panel}", "9", ("exec_type", "rate", "avg_lat"), ladders, rows, bound=2 * MOST, authors=known
    )


def rows(point: Point, measured: Measured) -> list[Row]:
    return [{"exec_type": SYSTEMS[point.system].kind, "rate": point.load.rate, "avg_lat": measured.avg_lat}]


def draw(folder: Path) -> None:
    """A panel for each CSV that is there, in the paper's order."""
    found = {panel: rows for panel in PANELS if (rows := read_csv(folder / f"fig9_{panel}.csv"))}
    columns = min(3, len(found))
    lines = -(-len(found) // columns)
    drawn = drawing.figure(max(4.5, 3 * columns), 2.6 * lines + (lines == 1))
    panels = []
    for number, (panel, rows) in enumerate(found.items(), 1):
        panels.append(axes := drawn.add_subplot(lines, columns, number))
        drawing.lines(axes, rows, "rate", "avg_lat")
        words = f"objective, {OBJECTIVE:g} s/token"
        axes.axhline(OBJECTIVE, color="grey", linewidth=0.8, linestyle="--", label=words)
        trace, model = panel.split("_")
        replicas = ", ".join(map(str, sorted({row["replicas"] for row in rows})))
        axes.set_title(f"{trace.upper()}, {model}, replicas: {replicas}", fontsize=9)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="requests/s (log)", ylabel="mean s/token", ylim=(0, MOST))
    drawing.legend(drawn, panels)
    drawing.save(drawn, folder, "figure9", [f"fig9_{panel}" for panel in found])


def experiments(options: argparse.Namespace) -> list[Experiment]:
    wanted = options.panels.split(",") if options.panels else PANELS
    if unknown := [panel for panel in wanted if panel not in PANELS]:
        raise ConfigError(f"--panels {unknown[0]!r} is unknown: use {', '.join(PANELS)}")
    return [experiment(panel) for panel in wanted]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--panels", help=f"with commas between, of {', '.join(PANELS)}; all if not given")


if __name__ == "__main__":
    main(__doc__, experiments, draw, more=add_options)
