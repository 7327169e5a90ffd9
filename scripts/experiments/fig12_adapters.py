"""Figure 12: requests a second that eight replicas answer, by the number of adapters.

    python scripts/experiments/fig12_adapters.py [--scale paper] [--data DIR] [--jobs 2] [--output figures]
    python scripts/experiments/fig12_adapters.py --server http://HOST:8000 --systems dlora --adapters 128

MAF2 on 16 to 128 adapters of 8 replicas; 3200 requests come at 24 a second, more than any of the paper's systems
answers. Writes fig12.csv, fig12.json and figure12.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
import argparse
from functools import partial

from experiments import authors, drawing
from experiments.experiment import Experiment, main
from experiments.loads import LoadSpec
from experiments.measured import Measured
from experiments.points import Ladder, Point
from experiments.settings import Settings
from experiments.systems import SYSTEMS
from experiments.tables import Row

SHOWN = ("vllm-artifact", "vllm", "peft-artifact", "peft", "dlora-artifact", "dlora", "kv", "grouped", "corrected")
ADAPTERS = (16, 32, 64, 128)


def ladders(settings: Settings, adapters: int | None = None) -> list[Ladder]:
    numbers = settings.some(ADAPTERS) if adapters is None else [adapters]
    loads = [LoadSpec("maf2", "0.0.0-0.6.0", 24, 3200, number) for number in numbers]
    return settings.points(SHOWN, 8, loads)


def rows(point: Point, measured: Measured) -> list[Row]:
    kind = SYSTEMS[point.system].kind
    return [{"exec_type": kind, "num_models": point.load.adapters, "throughput": measured.throughput}]


def experiments(options: argparse.Namespace) -> list[Experiment]:
    columns = ("exec_type", "num_models", "throughput")
    made = partial(ladders, adapters=options.adapters)
    return [Experiment("fig12", "12", columns, made, rows, keys=("system", "num_models"), authors=authors.FIGURE12)]


def draw(folder: Path) -> None:
    words = ("adapters", "requests/s")
    drawing.bar_picture(folder, "fig12", "figure12", "num_models", "throughput", words, (5, 3.2))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapters", type=int, help="this number alone, as a live server has it")


if __name__ == "__main__":
    main(__doc__, experiments, draw, more=add_options)
