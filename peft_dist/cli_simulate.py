"""``peft-dist simulate``: put a workload to simulated replicas, and report as ``peft-dist bench`` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_dist import cli_generate, cli_options
from peft_dist.cli_bench import check_folders, report
from peft_dist.cli_generate import WorkloadOptions
from peft_dist.core.errors import ConfigError
from peft_dist.core.versions import versions_of

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
    max_adapter_wait: Annotated[
        float | None, typer.Option(min=0, help="Seconds that a request may be overtaken: 5; inf: any.")
    ] = None,
    migration: Annotated[str, typer.Option(help="rr, proactive or dlora.")] = "dlora",
    merge: Annotated[str, typer.Option(help="auto, host (in place) or off.")] = "auto",
    merged_minority: Annotated[bool, typer.Option("--merged-minority", help="Others may join merged batches.")] = False,
    rank: Annotated[int, typer.Option(help="Of every adapter.")] = 16,
    max_loras: Annotated[
        int | None, typer.Option(help="Adapters on a device at once; the profile's by default,")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="and so most sequences in one step,")] = None,
    num_blocks: Annotated[int | None, typer.Option(help="and KV blocks,")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="and the longest prompt and output together, in tokens.")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Sequences that may wait; more are refused.")] = 1 << 30,
    plan: Annotated[
        str, typer.Option(help="Of moves: solver (HiGHS, bounded by work), or greedy (faster).")
    ] = "solver",
    plan_seconds: Annotated[float, typer.Option(help="That a plan is assumed to take.")] = 0.2,
    no_kv_moves: Annotated[bool, typer.Option("--no-kv-moves", help="Requests move without their KV.")] = False,
    rate: Annotated[float | None, typer.Option(help="Without WORKLOAD: requests a second, of all adapters.")] = None,
    requests: Annotated[
        int | None, typer.Option(help="How many; this and the rest as of peft-dist workload write.")
    ] = None,
    adapters: cli_generate.Adapters = WorkloadOptions.adapters,
    adapter_name: cli_generate.AdapterName = WorkloadOptions.adapter_name,
    popularity: cli_generate.Popularity = WorkloadOptions.popularity,
    zipf: cli_generate.Zipf = WorkloadOptions.zipf,
    maf1: cli_generate.Maf1 = WorkloadOptions.maf1,
    maf2: cli_generate.Maf2 = WorkloadOptions.maf2,
    functions: cli_generate.Functions = WorkloadOptions.functions,
    window: cli_generate.Window = WorkloadOptions.window,
    interval: cli_generate.Interval = WorkloadOptions.interval,
    need_sort: cli_generate.NeedSort = WorkloadOptions.need_sort,
    stride: cli_generate.Stride = WorkloadOptions.stride,
    skip_bad_rows: cli_generate.SkipBadRows = WorkloadOptions.skip_bad_rows,
    cv: cli_generate.Cv = WorkloadOptions.cv,
    correlated: cli_generate.Correlated = WorkloadOptions.correlated,
    seed: cli_generate.Seed = WorkloadOptions.seed,
    lengths: cli_generate.SyntheticLengths = WorkloadOptions.lengths,
    lengths_csv: cli_generate.LengthsCsv = WorkloadOptions.lengths_csv,
    sharegpt: cli_generate.ShareGPT = WorkloadOptions.sharegpt,
    tokenizer: cli_generate.Tokenizer = WorkloadOptions.tokenizer,
    fixed_lengths: cli_generate.FixedLengths = WorkloadOptions.fixed_lengths,
    max_prompt: cli_generate.MaxPrompt = WorkloadOptions.max_prompt,
    max_total: cli_generate.MaxTotal = WorkloadOptions.max_total,
    ratio: cli_generate.Ratio = WorkloadOptions.ratio,
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
    costs = CostProfile.load(profile)
    if max_model_len is not None:
        costs = replace(costs, max_model_len=max_model_len)
    asked = _workload(workload, given)
    if not asked.arrivals:
        raise ConfigError(f"{workload} has no requests: there is nothing to simulate")
    longest = max((one.prompt_tokens + one.output_tokens for one in asked.arrivals), default=0)
    if longest > costs.max_model_len:
        raise ConfigError(
            f"a request has {longest} tokens, prompt and output together, profile {costs.name!r} takes "
            f"{costs.max_model_len}: lower --max-total, or raise --max-model-len"
        )
    result = experiment.simulate(asked.arrivals, costs, options)
    run = result.run(asked.source, _versions())
    typer.echo(_told(result))
    typer.echo(report(records.summarize(run.records, objectives), run.source))
    if output is not None:
        records.write_json(run, output, objectives)
    if csv is not None:
        records.write_csv(run, csv)


def _workload(file: Path | None, given: Mapping[str, Any]) -> Workload:
    from peft_dist.workload import files

    if file is not None:
        # The seed is the orchestrator's too.
        if more := [option for option in WorkloadOptions.asked(given) if option != "--seed"]:
            raise ConfigError(f"{file} says when which requests come: leave out {', '.join(more)}, or the file")
        return files.read(file)
    if given["rate"] is None or given["requests"] is None:
        raise ConfigError("what is to be simulated? Name a workload, or give --rate and --requests")
    return cli_generate.make(cli_options.of(WorkloadOptions, given))


def _told(result: SimulationResult) -> str:
    """What a run that was not simulated has no words for."""
    profile, migration = result.source["profile"], result.migration
    lines = [
        f"simulated: {len(result.replicas)} x {profile['name']} ({profile['hardware']})",
        f"{result.seconds:.1f} virtual seconds in {result.wall_seconds:.1f} s, {result.events} events",
    ]
    options = result.source["options"]
    policy, kind = options.get("policy", "credit"), options["migration"]
    lines.append(f"exec type {options['exec_type']}, policy {policy}, migration {kind}")
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

    return {"peft_dist": __version__, **versions_of(_PACKAGES)}
