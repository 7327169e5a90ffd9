"""Figure 2b: what part of a request's time each replica lets it wait, where models are placed once and stay.

    python scripts/experiments/fig02b_queueing.py [--scale paper] [--data DIR] [--jobs 2] [--output figures]
    python scripts/experiments/fig02b_queueing.py --server http://HOST:8000 --systems vllm-artifact

MAF2 on 32 models of 8 replicas, 3 requests a second, 600 of them. In a simulation the wait is a request's time until
its first step, against all of its time; of a live server it is who waits and who is about, looked at twice a second.
Writes fig2b.csv, fig2b.json and figure2.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments import authors, drawing
from experiments.experiment import Experiment, main
from experiments.loads import LoadSpec
from experiments.measured import Measured
from experiments.points import Ladder, Point
from experiments.settings import Settings
from experiments.tables import Row, read_csv

SHOWN = ("vllm-artifact", "vllm", "peft", "dlora", "grouped")


def ladders(settings: Settings) -> list[Ladder]:
    return settings.points(SHOWN, 8, [LoadSpec("maf2", "0.0.0-0.6.0", 3, 600, 32)])


def rows(point: Point, measured: Measured) -> list[Row]:
    return [
        {"replica_id": replica, "queueing_ratio": 100 * share} for replica, share in enumerate(measured.work.queueing)
    ]


EXPERIMENT = Experiment(
    "fig2b", "2b", ("replica_id", "queueing_ratio"), ladders, rows, authors={"vllm-artifact": authors.FIGURE2}
)


def draw(folder: Path) -> None:
    drawn = drawing.figure(5, 2.8)
    axes = drawn.add_subplot()
    drawing.bars(axes, read_csv(folder / "fig2b.csv"), "replica_id", "queueing_ratio")
    axes.set(xlabel="replica", ylabel="queueing (% of time)", ylim=(0, 100))
    drawing.legend(drawn, [axes])
    drawing.save(drawn, folder, "figure2", ["fig2b"])


if __name__ == "__main__":
    main(__doc__, [EXPERIMENT], draw)
