"""Figure 11b: mean seconds a token by how much longer answers are, by what is done against imbalance between replicas.

    python scripts/experiments/fig11b_lengths.py [--scale paper] [--data DIR] [--jobs 2] [--output figures]
    python scripts/experiments/fig11b_lengths.py --server http://HOST:8000 --systems rr|proactive|dlora

MAF2 on 32 adapters of 8 replicas, 8 requests a second, 1000 of them; prompt and answer together are made 1 to 8 times
as long, up to 4096 tokens, by longer answers. (The artifact's notebook calls the axes "P90" and "Skewness (stride)";
what it plots are means by this ratio.) Writes fig11b.csv, fig11b.json and figure11b.
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

SHOWN = (
    *("rr-artifact", "proactive-artifact", "dlora-artifact", "rr", "proactive", "dlora", "kv", "grouped", "corrected"),
)
RATIOS = (1, 2, 4, 6, 8)


def ladders(settings: Settings) -> list[Ladder]:
    loads = [
        LoadSpec("maf2", "0.0.0-0.6.0", 8, 1000, 32, max_total=4096, ratio=ratio) for ratio in settings.some(RATIOS)
    ]
    return settings.points(SHOWN, 8, loads)


def rows(point: Point, measured: Measured) -> list[Row]:
    kind = SYSTEMS[point.system].migration
    return [{"migration_type": kind, "ratio": point.load.ratio, "avg_lat": measured.avg_lat}]


EXPERIMENT = Experiment(
    "fig11b", "11b", ("migration_type", "ratio", "avg_lat"), ladders, rows, authors=authors.FIGURE11B
)


def draw(folder: Path) -> None:
    words = ("ratio of lengths", "mean latency (s/token)")
    drawing.bar_picture(folder, "fig11b", "figure11b", "ratio", "avg_lat", words)


if __name__ == "__main__":
    main(__doc__, [EXPERIMENT], draw)
