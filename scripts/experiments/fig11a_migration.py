"""Figure 11a: how long requests queue, by what is done against imbalance between replicas.

    python scripts/experiments/fig11a_migration.py [--scale paper] [--data DIR] [--jobs 2] [--output figures]
    python scripts/experiments/fig11a_migration.py --server http://HOST:8000 --systems rr|proactive|dlora

MAF2's functions, the most popular first, on 32 adapters of 8 replicas; 130 s of requests at each rate. Writes
fig11a.csv (which figure 13 is drawn from), fig11a.json and figure11a.
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
from experiments.systems import SYSTEMS, chosen
from experiments.tables import Row, read_csv

SHOWN = (
    *("rr-artifact", "proactive-artifact", "dlora-artifact", "rr", "proactive", "dlora", "kv", "grouped", "corrected"),
)
SECONDS = 130
# The artifact's, and 36 for proactive too.
RATES = {
    "rr": (3, 4, 5, 6, 7, 8, 12),
    "dlora": (6, *range(8, 37, 4)),
}


def ladders(settings: Settings) -> list[Ladder]:
    return [
        [
            settings.point(system, "7b", 8, LoadSpec("maf2", "0.0.0-0.6.0", rate, SECONDS * rate, 32, need_sort=True))
            for rate in settings.some(RATES.get(system.name.removesuffix("-artifact"), RATES["dlora"]))
        ]
        for system in chosen(SHOWN, settings.systems)
    ]


def rows(point: Point, measured: Measured) -> list[Row]:
    return [
        {
            "migration_type": SYSTEMS[point.system].migration,
            "rate": point.load.rate,
            "queueing_delay": measured.queueing_delay,
            "adjust_time": measured.work.switch_seconds,
            "solver_time": measured.work.plan_seconds,
            "tot_time": measured.tot_time,
        }
    ]


EXPERIMENT = Experiment(
    "fig11a",
    "11a",
    ("migration_type", "rate", "queueing_delay", "adjust_time", "solver_time", "tot_time"),
    ladders,
    rows,
    authors=authors.FIGURE11A,
)


def draw(folder: Path) -> None:
    drawn = drawing.figure(4.5, 3.2)
    axes = drawn.add_subplot()
    drawing.lines(axes, read_csv(folder / "fig11a.csv"), "rate", "queueing_delay")
    axes.set(xlabel="requests/s", ylabel="queueing (s/token)", ylim=(0, None))
    drawing.legend(drawn, [axes])
    drawing.save(drawn, folder, "figure11a", ["fig11a"])


if __name__ == "__main__":
    main(__doc__, [EXPERIMENT], draw)
