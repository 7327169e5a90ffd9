"""``peft-dist simulate``: put a workload to simulated replicas, and report as ``peft-dist bench`` does."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_dist import cli_options
from peft_dist.cli_bench import check_folders, report
from peft_dist.core.errors import ConfigError

if TYPE_CHECKING:
    from peft_dist.sim.experiment import SimulationResult
    from peft_dist.workload.arrivals import Workload

# What the answer depends on beside ours: random numbers, and the solver.
_PACKAGES = ("numpy", "scipy")


def simulate(
    workload: Annotated[Path | None, typer.Argument(help="Written by peft-dist workload write.")] = None,
    profile: Annotated[
        str, typer.Option(help="What everything takes: a name of the package's, or a file.")
    ] = "paper-7b",
    replicas: Annotated[int, typer.Option(help="How many.")] = 1,
    exec_type: Annotated[str, typer.Option(help="dlora, or a baseline.")] = "dlora",
    policy: Annotated[str | None, typer.Option(help="credit (default), merge or fcfs.")] = None,
    policy_profile: Annotated[
        str, typer.Option(help="default, or artifact: constants and rules of the paper's.")
    ] = "default",
    migration: Annotated[str, typer.Option(help="rr, proactive or dlora.")] = "dlora",
    merge: Annotated[str, typer.Option(help="auto, host (in place) or off.")] = "auto",
    merged_minority: Annotated[bool, typer.Option("--merged-minority", help="Others may join merged batches.")] = False,
    rank: Annotated[int, typer.Option(help="Of every adapter.")] = 16,
    max_loras: Annotated[
        int | None, typer.Option(help="Adapters on a device at once; the profile's by default,")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="and so most sequences in one step,")] = None,
    num_blocks: Annotated[int | None, typer.Option(help="and KV blocks.")] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Sequences that may wait; more are refused.")] = 1 << 30,
    plan: Annotated[
        str, typer.Option(help="Of moves: solver (HiGHS, bounded by work), or greedy (faster).")
    ] = "solver",
    plan_seconds: Annotated[float, typer.Option(help="That a plan is assumed to take.")] = 0.2,
    no_kv_moves: Annotated[bool, typer.Option("--no-kv-moves", help="Requests move without their KV.")] = False,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    rate: Annotated[float | None, typer.Option(help="Without WORKLOAD: requests a second, of all adapters.")] = None,
    requests: Annotated[int | None, typer.Option(help="How many; the rest as of peft-dist workload write.")] = None,
    adapters: Annotated[int, typer.Option(min=1, help="How many.")] = 8,
    popularity: Annotated[str, typer.Option(help="trace, uniform or zipf.")] = "trace",
    zipf: Annotated[float, typer.Option(help="Exponent of zipf.")] = 1.0,
    maf1: Annotated[Path | None, typer.Option(help="Azure Functions 2019.")] = None,
    maf2: Annotated[Path | None, typer.Option(help="Azure Functions 2021.")] = None,
    window: Annotated[str, typer.Option(help="DAY.HOUR.MINUTE-DAY.HOUR.MINUTE of it.")] = "0.0.0-0.2.0",
    need_sort: Annotated[bool, typer.Option("--need-sort", help="Number functions by popularity.")] = False,
    stride: Annotated[int, typer.Option(min=1, help="Functions in a row that share an adapter.")] = 1,
    cv: Annotated[float, typer.Option(help="Of the gaps of an adapter's requests.")] = 1.0,
    lengths: Annotated[str, typer.Option(help="sharegpt, azure-conv or azure-code.")] = "sharegpt",
    ratio: Annotated[float, typer.Option(help="Times as long, by longer outputs.")] = 1.0,
    output: Annotated[Path | None, typer.Option(help="Source, summary and records as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="The records as CSV.")] = None,
    slo: Annotated[float, typer.Option(min=0, help="Objective: seconds a token of the answer; 0: none.")] = 0.5,
    slo_ttft: Annotated[float | None, typer.Option(help="Objective: seconds to the first token.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Objective: mean seconds between tokens.")] = None,
    slo_e2e: Annotated[float | None, typer.Option(help="Objective: seconds to the last token.")] = None,
) -> None:
    """Put WORKLOAD, or a generated one, to simulated replicas, which batch, place and migrate as those that serve."""
    given = locals()
    from peft_dist.sim import experiment
    from peft_dist.sim.options import SimulationOptions
    from peft_dist.sim.profile import CostProfile
    from peft_dist.workload import records

    check_folders(output, csv)
    objectives = records.Objectives(slo or None, slo_ttft, slo_tpot, slo_e2e)
    options = cli_options.of(SimulationOptions, given, adapters=(), moves_kv=not no_kv_moves)
    asked = _workload(
        workload,
        rate,
        requests,
        adapters=adapters,
        popularity=popularity,
        zipf=zipf,
        maf1=maf1,
        maf2=maf2,
        window=window,
        need_sort=need_sort,
        stride=stride,
        cv=cv,
        lengths=lengths,
        ratio=ratio,
        seed=seed,
    )
    result = experiment.simulate(asked.arrivals, CostProfile.load(profile), options)
    run = result.run(asked.source, _versions())
    typer.echo(_told(result))
    typer.echo(report(records.summarize(run.records, objectives), run.source))
    if output is not None:
        records.write_json(run, output, objectives)
    if csv is not None:
        records.write_csv(run, csv)


def _workload(file: Path | None, rate: float | None, requests: int | None, **options: Any) -> Workload:
    from peft_dist.cli_workload import make
    from peft_dist.workload import files

    if file is not None:
        if rate is not None or requests is not None:
            raise ConfigError(f"{file} says when requests come: leave out --rate and --requests, or the file")
        return files.read(file)
    if rate is None or requests is None:
        raise ConfigError("what is to be simulated? Name a workload, or give --rate and --requests")
    return make(rate=rate, requests=requests, **options)


def _told(result: SimulationResult) -> str:
    """What a run that was not simulated has no words for."""
    profile, migration = result.source["profile"], result.migration
    lines = [
        f"simulated: {len(result.replicas)} x {profile['name']} ({profile['hardware']})",
        f"{result.seconds:.1f} virtual seconds in {result.wall_seconds:.1f} s, {result.events} events",
    ]
    steps = sum(replica.steps for replica in result.replicas)
    merged = sum(replica.merged_steps for replica in result.replicas)
    switches = sum(replica.switches for replica in result.replicas)
    switching = sum(replica.switch_seconds for replica in result.replicas)
    loads = sum(replica.loads for replica in result.replicas)
    lines.append(f"{steps} steps, {merged} merged; {switches} switches in {switching:.2f} s; {loads} loads of adapters")
    if migration.plans:
        plans = ", ".join(f"{count} {name}" for name, count in migration.plans.items())
        moves = ", ".join(f"{count} {name}" for name, count in migration.moves.items()) or "none"
        lines.append(
            f"plans: {plans}; assumed to take {migration.plan_seconds:.2f} s, took {result.plan_wall_seconds:.2f} s "
            f"here; moves: {moves}"
        )
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    from peft_dist import __version__

    found = {"peft_dist": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
