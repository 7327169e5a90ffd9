"""Options that all experiments share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments import live, served
from experiments.loads import Data, LoadSpec
from experiments.points import Ladder, Point
from experiments.systems import SYSTEMS, System, chosen
from peft_dist.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of an experiment is run.

    Attributes:
        replicas: A larger cluster is cut down to so many, with its adapters and rates in proportion.
        requests: Share of the requests.
        every: Of a list of rates (or strides, ratios) every so many-th, from the last one back.
    """

    replicas: int
    requests: float
    every: int


SCALES = {"paper": Scale(32, 1.0, 1), "small": Scale(8, 0.3, 2), "tiny": Scale(2, 0.03, 4)}


@dataclass(frozen=True, slots=True)
class Settings:
    """What was asked for.

    Attributes:
        systems: Names of those to run; empty: all that the figure shows.
        jobs: Processes, each with points of its own.
        server: A live one, which runs the one of ``systems``; None: the simulator.
        replicas: Of the live server.
        served: What that one serves, see ``served.told``.
        rate_factor: Of all rates: for devices that are slower than the paper's.
        max_total: Longest prompt and output together, where that is less than the experiment's.
    """

    output: Path
    scale: str = "small"
    data: Data = field(default_factory=Data)
    seed: int = 0
    jobs: int = 1
    systems: tuple[str, ...] = ()
    correlated: bool = False
    server: live.Server | None = None
    replicas: int | None = None
    served: Mapping[str, Any] = field(default_factory=dict)
    rate_factor: float = 1.0
    max_total: int | None = None

    def some(self, values: Sequence[Any]) -> list[Any]:
        """Of rates and the like those that this scale runs."""
        return list(values[::-1][:: SCALES[self.scale].every][::-1])

    def points(self, names: Iterable[str], replicas: int, loads: Sequence[LoadSpec]) -> list[Ladder]:
        """Of the systems that a figure shows those that are to be run, under each of the loads, with the 7b model."""
        return [[self.point(one, "7b", replicas, load)] for one in chosen(names, self.systems) for load in loads]

    def point(self, system: System, model: str, replicas: int, load: LoadSpec) -> Point:
        """A run on so many replicas and under this load, or what of it is to be run."""
        scale = SCALES[self.scale]
        kept = min(replicas, self.replicas or scale.replicas)
        load = load.scaled(kept / replicas, scale.requests)
        total = load.max_total if self.max_total is None else min(load.max_total, self.max_total)
        load = replace(
            load, rate=load.rate * self.rate_factor, seed=self.seed, correlated=self.correlated, max_total=total
        )
        # A live server's rows are of the model that it serves, whatever the paper had.
        return Point(system.name, model if self.server is None else self.model, self.replicas or kept, load)

    @property
    def model(self) -> str:
        """Of the live server."""
        return str(self.served.get("model") or "not told")


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the common options."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = made.add_mutually_exclusive_group()
    where.add_argument("--sim", action="store_true", help="in the simulator (what is done if nothing else is said)")
    where.add_argument("--server", metavar="URL", help="against a live server, which runs the one of --systems")
    where.add_argument("--plot", action="store_true", help="run nothing, draw what the output folder holds")
    made.add_argument("--systems", help="run these alone, names as in the CSV, with commas between")
    made.add_argument("--scale", choices=sorted(SCALES), default="small", help="paper: as large as the paper's")
    made.add_argument(
        "--data", type=Path, metavar="DIR", help="folder with maf1/, maf2/, ShareGPT's JSON or lengths.csv"
    )
    made.add_argument("--maf1", type=Path, help="file or folder of the public format, before --data")
    made.add_argument("--maf2", type=Path, help="likewise")
    made.add_argument("--sharegpt", type=Path, help="ShareGPT's JSON, before that of --data")
    made.add_argument("--lengths-csv", type=Path, help="columns prompt_tokens,output_tokens, before ShareGPT's JSON")
    made.add_argument("--tokenizer", help="folder or hub id, to count ShareGPT's tokens")
    made.add_argument(
        "--skip-bad-rows", action="store_true", help="leave rows out that cannot be read, and say so; else they end it"
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument(
        "--correlated", action="store_true", help="one sequence of gaps for all adapters, as the artifact"
    )
    made.add_argument("--rate-factor", type=float, default=1.0, help="of all rates, for slower devices")
    made.add_argument(
        "--max-total", type=int, help="longest prompt and output together, for models with short contexts"
    )
    made.add_argument(
        "--end-id", type=int, default=30_000, help="prompts are token ids below it, for small vocabularies"
    )
    made.add_argument(
        "--max-lateness",
        type=float,
        default=live.MAX_LATENESS,
        help="seconds; with a later client (P99) nothing is told",
    )
    made.add_argument("--server-told", metavar="JSON", help=served.HINT.replace("%", "%%"))
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    made.add_argument(
        "--output", type=Path, default=Path("figures"), metavar="DIR", help="folder for CSV, JSON, PDF, PNG"
    )
    return made


def settings(options: argparse.Namespace) -> Settings:
    """Raises ConfigError for data or a server that is not there, and where options contradict each other."""
    if options.server and (not options.systems or "," in options.systems):
        raise ConfigError("--server needs --systems with one name: what does the server run?")
    system = SYSTEMS.get(options.systems or "")
    if options.server and system is not None and not system.is_live:
        raise ConfigError(f"a live server is no {system.name!r}: {system.live}. Simulate it, or measure 'peft'")
    if options.server_told and not options.server:
        raise ConfigError("--server-told tells of --server: name that too, or leave it out")
    if options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs}: it must be 1 process or more")
    # Not every figure reads all of them.
    for name in ("maf1", "maf2", "sharegpt", "lengths_csv"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            raise ConfigError(f"--{name.replace('_', '-')} {path}: there is no such file or folder; correct the path")
    found = Data.found(options.data, options.tokenizer)
    data = Data(
        options.maf1 or found.maf1,
        options.maf2 or found.maf2,
        None if options.lengths_csv else options.sharegpt or found.sharegpt,
        options.lengths_csv or (None if options.sharegpt else found.lengths),
        options.tokenizer,
        options.skip_bad_rows,
    )
    told = served.told(options.server, options.server_told) if options.server else {}
    if told and told["device"] is None:
        print("warning: nothing tells the server's device: --server-told '{\"device\": ...}'", file=sys.stderr)
    return Settings(
        output=options.output,
        scale=options.scale,
        data=data,
        seed=options.seed,
        jobs=options.jobs,
        systems=tuple(options.systems.split(",")) if options.systems else (),
        correlated=options.correlated,
        server=live.Server(options.server, options.end_id, options.max_lateness) if options.server else None,
        replicas=told.get("replicas"),
        served=told,
        rate_factor=options.rate_factor,
        max_total=options.max_total,
    )
