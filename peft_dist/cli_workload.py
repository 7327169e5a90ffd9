"""``peft-dist workload``: write workloads, and describe them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_dist import cli_generate, cli_options
from peft_dist.cli_generate import WorkloadOptions

if TYPE_CHECKING:
    from peft_dist.workload.arrivals import Workload

app = typer.Typer(no_args_is_help=True, help="Write and describe workloads: when which adapter is asked for how much.")


@app.command()
def write(
    file: Annotated[Path, typer.Argument(help="Where to: JSON lines, or CSV when it ends in .csv.")],
    rate: Annotated[float, typer.Option(help="Requests a second of all adapters together.")],
    requests: Annotated[int, typer.Option(help="How many.")],
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
) -> None:
    """Write a workload to FILE; its first line tells where everything in it comes from."""
    given = locals()
    from peft_dist.workload import files

    made = cli_generate.make(cli_options.of(WorkloadOptions, given))
    files.write(made, file)
    _show(made, None)


@app.command()
def describe(
    file: Annotated[Path, typer.Argument(help="A workload: JSON lines or CSV.")],
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="And a picture (SVG, PDF or PNG).")] = None,
) -> None:
    """Show a workload's source, rate, cv, lengths and adapters."""
    from peft_dist.workload import files

    _show(files.read(file), plot)


@app.command()
def trace(
    file: Annotated[Path, typer.Argument(help="Where to; gzipped when it ends in .gz.")],
    functions: Annotated[int, typer.Option(min=1, help="How many; those that are never called are left out.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is random.")] = 0,
) -> None:
    """Write a synthetic day in the format of Azure Functions 2019."""
    from peft_dist.workload import synthetic

    synthetic.write_maf1(file, functions, seed)
    typer.echo(f"{file}: {synthetic.ORIGIN}, seed {seed}")


def _show(workload: Workload, plot: Path | None) -> None:
    from peft_dist.workload import describe as describing

    typer.echo(describing.table(workload))
    if plot is not None:
        describing.plot(workload, plot)
