"""Figure 7: how many functions are called over three days, relative to the busiest part of an hour.

    python scripts/experiments/fig07_trace.py [--data DIR] [--seed 0] [--output figures]

MAF1, days 1 to 3, in 36 bins of 40 minutes a day; without the public files a synthetic trace, which the result names.
Nothing is served, and nothing simulated. Writes fig7.csv, fig7.json and figure7.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from experiments import authors, drawing
from experiments.experiment import versions
from experiments.loads import FUNCTIONS, Data, on_error, tell
from experiments.settings import parser, settings
from experiments.tables import Row, check_drawn, check_folder, read_csv, write_csv, write_json
from peft_dist.core.errors import ConfigError, PeftDistError
from peft_dist.workload import synthetic, traces
from peft_dist.workload.traces import DAY_MINUTES, Trace, Window

COLUMNS = ("day", "relative")
BIN = 40


def read(data: Data, days: int, seed: int) -> Trace:
    """A file of one day alone gives one day."""
    if data.maf1 is not None and data.maf1.is_file():
        days = 1
    window = Window(0, days * DAY_MINUTES)
    if data.maf1 is None:
        return synthetic.maf_like(FUNCTIONS["maf1"], window, seed, BIN)
    trace = traces.read_maf1(data.maf1, window, BIN, on_error(data))
    tell(trace)
    return trace


def rows(trace: Trace) -> list[Row]:
    calls = trace.counts.sum(axis=0)
    most = calls.max()
    units = "day=days relative=1"
    return [
        {
            "day": index * BIN / DAY_MINUTES,
            "relative": float(count / most),
            "calls": int(count),
            "mode": "trace",
            "units": units,
        }
        for index, count in enumerate(calls)
    ]


def draw(folder: Path) -> None:
    found = read_csv(folder / "fig7.csv")
    drawn = drawing.figure(5, 2.4)
    axes = drawn.add_subplot()
    axes.plot([row["day"] for row in found], [row["relative"] for row in found])
    axes.set(xlabel="day", ylabel="relative invocations", ylim=(min(0.5, *(row["relative"] for row in found)), 1))
    drawing.save(drawn, folder, "figure7", ["fig7"])


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--days", type=int, default=3)
    options = made.parse_args()
    try:
        if options.plot:
            check_drawn(options.output, ["fig7"])
        else:
            chosen = settings(options)
            if options.days < 1:
                raise ConfigError(f"--days {options.days}: it must be 1 or more")
            check_folder(options.output)
            trace = read(chosen.data, options.days, chosen.seed)
            write_csv(options.output / "fig7.csv", COLUMNS, rows(trace))
            about: dict[str, Any] = {
                "figure": "7",
                "mode": "trace",
                "data": trace.source,
                "bin_minutes": BIN,
                "versions": versions(),
                "authors": authors.FIGURE7,
            }
            if chosen.data.maf1 is None:
                about["seed"] = chosen.seed
            write_json(options.output / "fig7.json", about)
        draw(options.output)
    except PeftDistError as error:
        raise SystemExit(f"fig07_trace.py: {error}") from error


if __name__ == "__main__":
    main()
