"""Figure 10: the batching policies of one replica under growing skew.

    python scripts/experiments/fig10_policies.py [--scale paper] [--data DIR] [--jobs 2] [--output figures]
    python scripts/experiments/fig10_policies.py --server http://HOST:8000 --systems fcfs|merge|dlora

MAF2's functions, the most popular first, on 8 adapters of one replica; a larger stride puts more of the hottest
functions on one adapter. 4 requests a second, 400 of them. Writes fig10.csv, fig10.json, figure10a (mean) and figure10b
(P90).
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
from experiments.systems import SYSTEMS
from experiments.tables import Row

STRIDES = (4, 8, 16, 32)
SHOWN = ("fcfs-artifact", "merge-artifact", "dlora-artifact", "fcfs", "merge", "dlora", "grouped", "corrected")


def ladders(settings: Settings) -> list[Ladder]:
    loads = [
        LoadSpec("maf2", "0.0.0-0.6.0", 4, 400, 8, need_sort=True, stride=stride) for stride in settings.some(STRIDES)
    ]
    return settings.points(SHOWN, 1, loads)


def rows(point: Point, measured: Measured) -> list[Row]:
    policy = SYSTEMS[point.system].policy
    return [{"policy": policy, "stride": point.load.stride, "avg_lat": measured.avg_lat, "p90_lat": measured.p90_lat}]


EXPERIMENT = Experiment(
    "fig10", "10", ("policy", "stride", "avg_lat", "p90_lat"), ladders, rows, authors=authors.FIGURE10
)


def draw(folder: Path) -> None:
    for name, column, words in (("figure10a", "avg_lat", "mean"), ("figure10b", "p90_lat", "P90")):
        drawing.bar_picture(folder, "fig10", name, "stride", column, ("skew (stride)", f"{words} latency (s/token)"))


if __name__ == "__main__":
    main(__doc__, [EXPERIMENT], draw)
