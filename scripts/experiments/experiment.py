"""What all experiments have in common: points in, CSV and JSON and pictures out."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import scipy

from experiments import beside, points
from experiments.loads import LoadSpec
from experiments.measured import Asked, Measured
from experiments.points import Ladder, Point
from experiments.settings import Settings, parser, settings
from experiments.simulated import profile_of, rules_of
from experiments.systems import SYSTEMS
from experiments.tables import Row, check_drawn, check_folder, read_csv, read_json, write_csv, write_json
from peft_dist import __version__
from peft_dist.core.errors import ConfigError, PeftDistError

UNITS = {
    "rate": "requests/s", "throughput": "requests/s", "avg_lat": "s/token", "p90_lat": "s/token",
    "queueing_delay": "s/token", "adjust_time": "s", "solver_time": "s", "tot_time": "s", "ratio": "1",
    "stride": "functions", "num_models": "adapters", "queueing_ratio": "%", "slo_attainment": "1",
    "output_tokens": "tokens", "switch_seconds": "s", "plan_seconds": "s", "active_adapters": "adapters",
    "largest_share": "1",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Experiment:
    """One CSV.

    Attributes:
        name: Of CSV and JSON.
        figure: In the paper.
        columns: The artifact's.
        ladders: What is to be run.
        rows: The artifact's columns of one point.
        keys: Columns that tell apart runs whose rows stand beside each other, of ``beside.KEYS``.
        bound: Mean s/token beyond which a system's further points are not run; None: all are.
        authors: The authors' own figures, for the JSON.
    """

    name: str
    figure: str
    columns: Sequence[str]
    ladders: Callable[[Settings], Sequence[Ladder]]
    rows: Callable[[Point, Measured], Sequence[Row]]
    bound: float | None = None
    keys: Sequence[str] = ("system",)
    authors: Any = field(default_factory=dict)


def run(experiment: Experiment, chosen: Settings) -> list[Row]:
    """Run, and write CSV and JSON. Returns all rows, those of earlier runs of other systems included.

    Raises ConfigError before anything is run where the folder has this CSV from simulations and this is none, or the
    other way round; and where it has other systems' rows that are of another scale, seed, model, profile or the like.
    """
    ladders = [ladder for ladder in experiment.ladders(chosen) if ladder]
    mode = "simulated" if chosen.server is None else "live"
    table, document = chosen.output / f"{experiment.name}.csv", chosen.output / f"{experiment.name}.json"
    before = read_csv(table)
    if others := {row["mode"] for row in before} - {mode}:
        raise ConfigError(f"{table} is {min(others)}, this is to be {mode}: give another --output, or remove it")
    told = read_json(document)
    asked = [point for ladder in ladders for point in ladder]
    kept = beside.kept(before, asked, experiment.keys)
    if mode == "simulated":
        about = _about(experiment, chosen, mode, []) | _simulated(asked, chosen.seed)
        beside.check(table, kept, told, about, lambda name: rules_of(name, chosen.seed))
    else:
        beside.check_live(table, kept, experiment.keys, told, _server(chosen))
    check_folder(chosen.output)
    found = points.run(ladders, chosen.data, experiment.bound, chosen.jobs, chosen.server)
    rows = [
        _row(experiment, mode, point, measured, row)
        for point, measured in found
        for row in experiment.rows(point, measured)
    ]
    about = _about(experiment, chosen, mode, found)
    if mode == "live":
        # A server runs one system; the others' rows come from other runs.
        runs = dict.fromkeys(beside.run_name(experiment.keys, row) for row in rows)
        rows = [*kept, *rows]
        about = _add_live(told, about, chosen, list(runs))
    elif kept:
        systems = [ladder[0].system for ladder in experiment.ladders(replace(chosen, systems=())) if ladder]
        rows = beside.in_order([*kept, *rows], experiment.keys, list(dict.fromkeys(systems)))
        about = beside.together(told, about, list(dict.fromkeys(systems)))
    write_csv(table, experiment.columns, rows)
    write_json(document, about)
    return rows


def _row(experiment: Experiment, mode: str, point: Point, measured: Measured, own: Row) -> Row:
    system = SYSTEMS[point.system]
    units = {name: UNITS[name] for name in (*own, *measured.columns) if name in UNITS}
    common = {
        "system": point.system, "form": system.form, "mode": mode, "model": point.model, "replicas": point.replicas,
        "adapters": point.load.adapters, "load_rate": point.load.rate,
    }  # fmt: skip
    if mode == "live":
        common["live_differs"] = system.live
    rest = {key: value for key, value in measured.columns.items() if key not in own}
    return own | common | rest | {"units": " ".join(f"{name}={unit}" for name, unit in units.items())}


def _about(experiment: Experiment, chosen: Settings, mode: str, found: points.Found) -> dict[str, Any]:
    run = [point for point, _ in found]
    asked = {point.load: measured.asked for point, measured in found}
    about: dict[str, Any] = {
        "figure": experiment.figure,
        "mode": mode,
        "scale": chosen.scale,
        "seed": chosen.seed,
        "data": chosen.data.source,
        "correlated": chosen.correlated,
        "rate_factor": chosen.rate_factor,
        "max_total": chosen.max_total,
        "versions": versions(),
        "authors": experiment.authors,
        "loads": [_load(load, one) for load, one in asked.items()],
    }
    if mode == "simulated":
        about |= _simulated(run, chosen.seed)
    return about


def _simulated(run: Sequence[Point], seed: int) -> dict[str, Any]:
    """What these points are simulated with."""
    return {
        "profiles": [profile_of(model) for model in dict.fromkeys(point.model for point in run)],
        "systems": {name: rules_of(name, seed) for name in dict.fromkeys(point.system for point in run)},
    }


def _load(load: LoadSpec, asked: Asked | None) -> dict[str, Any]:
    """What was asked for, and what of a trace and of lengths that came of."""
    told = {} if asked is None else asdict(asked)
    if "source" in told:
        told["workload"] = {"source": told.pop("source")}
    return asdict(load) | told


def _add_live(
    before: Mapping[str, Any], about: dict[str, Any], chosen: Settings, runs: Sequence[str]
) -> dict[str, Any]:
    """This run beside earlier ones of other systems, each with its server and the machine that asked it."""
    from bench.report import environment

    assert chosen.server is not None
    own = _server(chosen) | {"loads": about["loads"], "client": environment()}
    own |= {"max_lateness": chosen.server.max_lateness, "differs": SYSTEMS[chosen.systems[0]].live}
    return about | {"servers": {**before.get("servers", {}), **dict.fromkeys(runs, own)}}


def _server(chosen: Settings) -> dict[str, Any]:
    """The live server and what is asked of it."""
    assert chosen.server is not None
    own = {"server": chosen.server.url, "scale": chosen.scale, "seed": chosen.seed, "data": chosen.data.source}
    own |= {"correlated": chosen.correlated, "rate_factor": chosen.rate_factor, "max_total": chosen.max_total}
    return own | dict(chosen.served)


def versions() -> dict[str, str]:
    """Of all that the bytes of results depend on, pictures included."""
    found = {
        "peft_dist": __version__, "python": platform.python_version(), "numpy": numpy.__version__,
        "scipy": scipy.__version__,
    }  # fmt: skip
    with suppress(PackageNotFoundError):
        found["matplotlib"] = version("matplotlib")
    return found


def main(
    description: str | None,
    experiments: Callable[[Any], Sequence[Experiment]] | Sequence[Experiment],
    draw: Callable[[Path], None],
    arguments: Sequence[str] | None = None,
    more: Callable[[Any], None] | None = None,
) -> None:
    """The command of a figure. ``more`` adds options to the common ones; errors of ours end it with their words."""
    made = parser(description)
    if more is not None:
        more(made)
    options = made.parse_args(arguments)
    try:
        wanted = experiments(options) if callable(experiments) else experiments
        if options.plot:
            check_drawn(options.output, [one.name for one in wanted])
        else:
            chosen = settings(options)
            for one in wanted:
                run(one, chosen)
        draw(options.output)
    except PeftDistError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
