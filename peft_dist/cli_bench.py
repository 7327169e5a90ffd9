"""``peft-dist bench``: put a workload to a server and report what came of it."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from peft_dist.cli_checks import raise_file_limit
from peft_dist.cli_options import json_object
from peft_dist.core.errors import ConfigError

if TYPE_CHECKING:
    from peft_dist.workload.client import Outcome
    from peft_dist.workload.records import Summary
    from peft_dist.workload.sending import ClientOptions

API_KEY_VARIABLE = "PEFT_DIST_API_KEY"


def bench(
    url: Annotated[str, typer.Argument(help="The server: http://HOST:PORT, ours or another with OpenAI's API.")],
    workload: Annotated[Path, typer.Argument(help="Written by peft-dist workload write.")],
    output: Annotated[Path | None, typer.Option(help="Source, summary and records as JSON.")] = None,
    csv: Annotated[Path | None, typer.Option(help="The records as CSV.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Model of the requests without an adapter.")] = None,
    api_key: Annotated[str | None, typer.Option(help=f"Or the variable {API_KEY_VARIABLE}.")] = None,
    prompts: Annotated[str, typer.Option(help="ids: token ids, exactly as long as asked for; or text.")] = "ids",
    first_id: Annotated[int, typer.Option(min=0, help="Prompts are drawn from these token ids on,")] = 100,
    end_id: Annotated[int, typer.Option(min=1, help="up to this one, which must be in the vocabulary.")] = 30_000,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 1.0,
    respect_eos: Annotated[bool, typer.Option("--respect-eos", help="Answers may be shorter than asked for.")] = False,
    no_running_usage: Annotated[bool, typer.Option("--no-running-usage", help="For servers that refuse it.")] = False,
    extra_body: Annotated[str, typer.Option(metavar="JSON", help="Further fields of every request.")] = "{}",
    warm_up: Annotated[int, typer.Option(min=0, help="Short requests to each adapter before the start.")] = 1,
    warm_within: Annotated[
        float, typer.Option(min=0, help="Seconds to wait until our server has captured its steps; 0: it is not asked.")
    ] = 300.0,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.")] = 3600.0,
    max_lateness: Annotated[float, typer.Option(help="Seconds; a later client (P99) reports nothing.")] = 0.05,
    processes: Annotated[int, typer.Option(min=1, help="That send; more for many thousand tokens a second.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts.")] = 0,
    slo: Annotated[float, typer.Option(min=0, help="Objective: seconds a token of the answer; 0: none.")] = 0.5,
    slo_ttft: Annotated[float | None, typer.Option(help="Objective: seconds to the first token.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Objective: mean seconds between tokens.")] = None,
    slo_e2e: Annotated[float | None, typer.Option(help="Objective: seconds to the last token.")] = None,
) -> None:
    """Send the requests of WORKLOAD to the server at URL, each at its time, and report how it did."""
    from peft_dist.workload import files, records
    from peft_dist.workload.prompts import Prompts
    from peft_dist.workload.sending import ClientOptions

    requests = files.read(workload)
    objectives = records.Objectives(slo or None, slo_ttft, slo_tpot, slo_e2e)
    options = ClientOptions(
        url=url,
        base_model=base_model,
        api_key=api_key or os.environ.get(API_KEY_VARIABLE, "").split(" ")[0] or None,
        prompts=Prompts(cast(Any, prompts), first_id, end_id, seed),
        temperature=temperature,
        ignore_eos=not respect_eos,
        running_usage=not no_running_usage,
        extra=json_object("--extra-body", extra_body),
        warm_up=warm_up,
        warm_within=warm_within,
        timeout=timeout,
        max_lateness=max_lateness,
        processes=processes,
    )
    check_folders(output, csv)
    raise_file_limit()
    outcome = asyncio.run(_run(requests, options))
    outcome.check_schedule(max_lateness)
    wanted = [arrival.output_tokens for arrival in requests.arrivals]
    source = _source(requests.source, options, outcome, wanted)
    run = records.Run(outcome.records, source)
    typer.echo(report(records.summarize(run.records, objectives), source))
    if output is not None:
        records.write_json(run, output, objectives)
    if csv is not None:
        records.write_csv(run, csv)


async def _run(requests: Any, options: ClientOptions) -> Outcome:
    from tqdm import tqdm

    from peft_dist.workload import client

    # None: only on a terminal.
    with tqdm(total=len(requests.arrivals), unit="request", smoothing=0, disable=None) as bar:
        return await client.run(requests, options, lambda record: bar.update())


def _source(workload: dict[str, Any], options: ClientOptions, outcome: Outcome, wanted: list[int]) -> dict[str, Any]:
    """Where the figures come from, without the key."""
    names = ("temperature", "ignore_eos", "warm_up", "timeout", "max_lateness", "processes")
    told = {name: getattr(options, name) for name in names}
    short = sum(r.error is None and r.output_tokens < most for r, most in zip(outcome.records, wanted, strict=True))
    return {
        "workload": workload,
        "server": options.root,
        "client": {
            **told,
            "prompts": asdict(options.prompts),
            **dict(options.extra),
            "max_lateness": options.max_lateness,
        },
        "server_was_warm": outcome.was_warm,
        "server_queue": None if outcome.queue is None else asdict(outcome.queue),
        "answers_shorter_than_asked": short,
    }


def check_folders(*files: Path | None) -> None:
    """Raises ConfigError where a file could not be written after a run."""
    for file in filter(None, files):
        if not file.parent.is_dir():
            raise ConfigError(f"{file} could not be written after the run: there is no folder {file.parent}")
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            raise ConfigError(f"{file} could not be written after the run: name a file that can be, in another folder")


def report(summary: Summary, source: dict[str, Any]) -> str:
    """Lines of text for people."""
    lines = [
        f"{summary.requests} requests in {summary.duration:.2f} s, {summary.failed} failed",
        f"throughput: {summary.request_throughput:.3f} requests/s, {summary.prompt_throughput:.1f} prompt tokens/s, "
        f"{summary.output_throughput:.1f} output tokens/s",
        f"SLO attainment: {summary.slo_attainment:.1%} ({_objectives(summary)})",
        f"goodput: {summary.goodput:.3f} requests/s",
        "",
        f"{'seconds':<18}{'mean':>11}{'P50':>11}{'P90':>11}{'P99':>11}",
    ]
    for label, name in _ROWS:
        found = getattr(summary, name)
        if found is not None:
            numbers = (found.mean, found.p50, found.p90, found.p99)
            lines.append(f"{label:<18}" + "".join(f"{number:>11.4f}" for number in numbers))
    queue = source.get("server_queue")
    if summary.queueing_share is not None:
        lines.append(f"share of queueing: {summary.queueing_share:.1%}")
    elif queue is not None and queue["share"] is not None:
        lines.append(f"share of queueing: {queue['share']:.1%} ({queue['metric']}, {queue['requests']} requests)")
    if source.get("server_was_warm") is False:
        lines.append("the server still captured steps (a quarter of a second each): see --warm-within")
    if short := source.get("answers_shorter_than_asked"):
        lines.append(f"{short} answers were shorter than asked for: seconds a token do not compare with other runs")
    return "\n".join(lines)


_ROWS = (
    ("per output token", "normalized_latency"),
    *(("to first token", "ttft"), ("between events", "itl"), ("between tokens", "tpot"), ("end to end", "e2e")),
    *(("queueing", "queueing"), ("client's lateness", "lateness")),
)


def _objectives(summary: Summary) -> str:
    bounds = asdict(summary.objectives).items()
    return ", ".join(f"{name} <= {bound:g} s" for name, bound in bounds if bound is not None) or "answered"
