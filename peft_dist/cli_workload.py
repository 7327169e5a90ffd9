"""``peft-dist workload``: write workloads, and describe them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peft_dist.core.errors import ConfigError

if TYPE_CHECKING:
    from peft_dist.workload.arrivals import Workload
    from peft_dist.workload.lengths import CountTokens, Filters, Lengths
    from peft_dist.workload.rows import BadRows, OnError
    from peft_dist.workload.traces import Trace

HUB = "hub"

_ADAPTERS = 8

app = typer.Typer(no_args_is_help=True, help="Write and describe workloads: when which adapter is asked for how much.")


@app.command()
def write(
    file: Annotated[Path, typer.Argument(help="Where to: JSON lines, or CSV when it ends in .csv.")],
    rate: Annotated[float, typer.Option(help="Requests a second of all adapters together.")],
    requests: Annotated[int, typer.Option(help="How many.")],
    adapters: Annotated[int | None, typer.Option(min=1, help="How many; 8, or as many as there are names.")] = None,
    adapter_name: Annotated[
        str, typer.Option(help="Name of adapter {} from 0 on; or all names: sql,json.")
    ] = "adapter-{}",
    popularity: Annotated[str, typer.Option(help="trace, uniform or zipf.")] = "trace",
    zipf: Annotated[float, typer.Option(help="Exponent of zipf.")] = 1.0,
    maf1: Annotated[Path | None, typer.Option(help="Azure Functions 2019: a day's file, or their folder.")] = None,
    maf2: Annotated[Path | None, typer.Option(help="Azure Functions 2021: the file, or its folder.")] = None,
    functions: Annotated[int, typer.Option(min=1, help="Of the synthetic trace, where no file is given.")] = 1000,
    window: Annotated[str, typer.Option(help="Part of the trace: DAY.HOUR.MINUTE-DAY.HOUR.MINUTE.")] = "0.0.0-0.2.0",
    interval: Annotated[int, typer.Option(min=1, help="Minutes during which the shares stay as they are.")] = 60,
    need_sort: Annotated[bool, typer.Option("--need-sort", help="Number functions by popularity.")] = False,
    stride: Annotated[int, typer.Option(min=1, help="Functions in a row that share an adapter.")] = 1,
    skip_bad_rows: Annotated[bool, typer.Option("--skip-bad-rows", help="Leave them out and say so.")] = False,
    cv: Annotated[float, typer.Option(help="Of the gaps of an adapter's requests; 1: Poisson.")] = 1.0,
    correlated: Annotated[bool, typer.Option("--correlated", help="One stream of gaps, as the artifact.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is random.")] = 0,
    lengths: Annotated[str, typer.Option(help="Synthetic ones: sharegpt, azure-conv or azure-code.")] = "sharegpt",
    lengths_csv: Annotated[Path | None, typer.Option(help="A file with prompt_tokens,output_tokens.")] = None,
    sharegpt: Annotated[str | None, typer.Option(help="ShareGPT's JSON; 'hub' downloads it.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id, to count ShareGPT's tokens.")] = None,
    fixed_lengths: Annotated[str | None, typer.Option(metavar="PROMPT,OUTPUT", help="Every request alike.")] = None,
    max_prompt: Annotated[int, typer.Option(help="Longer ones are dropped, in tokens.")] = 1024,
    max_total: Annotated[int, typer.Option(help="Prompt and output together.")] = 2048,
    ratio: Annotated[float, typer.Option(help="Times as long, by longer outputs, to at most --max-total.")] = 1.0,
) -> None:
    """Write a workload to FILE; its first line tells where everything in it comes from."""
    from peft_dist.workload import files

    made = make(
        rate=rate,
        requests=requests,
        adapters=adapters,
        adapter_name=adapter_name,
        popularity=popularity,
        zipf=zipf,
        maf1=maf1,
        maf2=maf2,
        functions=functions,
        window=window,
        interval=interval,
        need_sort=need_sort,
        stride=stride,
        skip_bad_rows=skip_bad_rows,
        cv=cv,
        correlated=correlated,
        seed=seed,
        lengths=lengths,
        lengths_csv=lengths_csv,
        sharegpt=sharegpt,
        tokenizer=tokenizer,
        fixed_lengths=fixed_lengths,
        max_prompt=max_prompt,
        max_total=max_total,
        ratio=ratio,
    )
    files.write(made, file)
    _show(made, None)


def make(
    *,
    rate: float,
    requests: int,
    adapters: int | None = None,
    adapter_name: str = "adapter-{}",
    popularity: str = "trace",
    zipf: float = 1.0,
    maf1: Path | None = None,
    maf2: Path | None = None,
    functions: int = 1000,
    window: str = "0.0.0-0.2.0",
    interval: int = 60,
    need_sort: bool = False,
    stride: int = 1,
    skip_bad_rows: bool = False,
    cv: float = 1.0,
    correlated: bool = False,
    seed: int = 0,
    lengths: str = "sharegpt",
    lengths_csv: Path | None = None,
    sharegpt: str | None = None,
    tokenizer: str | None = None,
    fixed_lengths: str | None = None,
    max_prompt: int = 1024,
    max_total: int = 2048,
    ratio: float = 1.0,
) -> Workload:
    """A workload, as the options of ``write`` say; bad rows that are skipped are told on standard error."""
    from peft_dist.workload import arrivals, generator
    from peft_dist.workload.lengths import Filters

    on_error: OnError = "skip" if skip_bad_rows else "fail"
    filters = Filters(max_prompt=max_prompt, max_total=max_total, ratio=ratio)
    names = _names(adapter_name, adapters)
    load = generator.Load(rate, requests, cv, seed, correlated)
    sizes = _lengths(lengths, lengths_csv, sharegpt, tokenizer, fixed_lengths, filters, seed, on_error)
    if popularity == "trace":
        trace = _trace(maf1, maf2, window, interval, functions, seed, on_error)
        _tell(trace.bad)
        made = generator.from_trace(names, trace.by_popularity() if need_sort else trace, stride, load, sizes)
    elif popularity not in ("uniform", "zipf"):
        raise ConfigError(f"--popularity {popularity!r} is unknown: use trace, uniform or zipf")
    elif maf1 or maf2:
        raise ConfigError("--maf1 and --maf2 are for --popularity trace")
    else:
        exponent = zipf if popularity == "zipf" else 0.0
        words = f"Zipf ({exponent:g})" if exponent else "uniform"
        made = generator.from_shares(names, arrivals.zipf(len(names), exponent), words, load, sizes)
    _tell(sizes.bad)
    return made


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


def _names(template: str, count: int | None) -> list[str]:
    """Names of ``count`` adapters; None: of as many as are listed, or 8. Raises ConfigError."""
    if "," in template and "{}" not in template:
        names = template.split(",")
        if not all(names) or len(set(names)) < len(names):
            raise ConfigError(f"--adapter-name {template!r} has an empty name, or one twice: correct it")
        if count not in (None, len(names)):
            raise ConfigError(f"--adapter-name {template!r} has {len(names)} names, not {count}: leave --adapters out")
        return names
    count = count or _ADAPTERS
    names = [template.replace("{}", str(index)) for index in range(count)]
    if len(set(names)) < count:
        raise ConfigError(
            f"--adapter-name {template!r} names {count} adapters alike: put {{}} where the number belongs, or give all "
            "names, separated by commas"
        )
    return names


def _trace(
    maf1: Path | None, maf2: Path | None, window: str, interval: int, functions: int, seed: int, on_error: OnError
) -> Trace:
    from peft_dist.workload import synthetic, traces

    part = traces.Window.parse(window)
    if maf1 and maf2:
        raise ConfigError("--maf1 and --maf2 are two traces: give one")
    if maf1:
        return traces.read_maf1(maf1, part, interval, on_error)
    if maf2:
        return traces.read_maf2(maf2, part, interval, on_error)
    return synthetic.maf_like(functions, part, seed, interval)


def _lengths(
    synthetic: str,
    csv: Path | None,
    sharegpt: str | None,
    tokenizer: str | None,
    fixed: str | None,
    filters: Filters,
    seed: int,
    on_error: OnError,
) -> Lengths:
    from peft_dist.workload import lengths

    if sum(option is not None for option in (csv, sharegpt, fixed)) > 1:
        raise ConfigError("--lengths-csv, --sharegpt and --fixed-lengths exclude each other: give one")
    if csv is not None:
        return lengths.read_csv(csv, on_error).filtered(filters)
    if fixed is not None:
        prompt, _, output = fixed.partition(",")
        if not (prompt.isdigit() and output.isdigit()):
            raise ConfigError(f"--fixed-lengths {fixed!r} is not PROMPT,OUTPUT: write for example 128,64")
        return lengths.fixed(int(prompt), int(output))
    if sharegpt is None:
        return lengths.synthetic(synthetic, filters, seed)
    count = token_counter(tokenizer)
    if sharegpt == HUB:
        return lengths.download_sharegpt(count).filtered(filters)
    return lengths.read_sharegpt(Path(sharegpt), count, on_error).filtered(filters)


def token_counter(name: str | None) -> CountTokens:
    """Counts tokens as the tokenizer does by default, special tokens that it adds included."""
    from tokenizers import Tokenizer

    if name is None:
        raise ConfigError("--sharegpt has texts: name the model's --tokenizer to count their tokens")
    file = Path(name) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file)) if Path(name).is_dir() else Tokenizer.from_pretrained(name)
    except Exception as error:  # The tokenizers library raises bare Exceptions for what it cannot read.
        raise ConfigError(f"--tokenizer {name!r} cannot be loaded: {error}") from error
    tokenizer.no_truncation()

    def count(texts: Sequence[str]) -> list[int]:
        return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]

    return count


def _tell(bad: BadRows) -> None:
    for message in bad.examples:
        typer.echo(f"skipped: {message}", err=True)
    if bad.count > len(bad.examples):
        typer.echo(f"skipped: {bad.count - len(bad.examples)} more bad rows", err=True)


def _show(workload: Workload, plot: Path | None) -> None:
    from peft_dist.workload import describe as describing

    typer.echo(describing.table(workload))
    if plot is not None:
        describing.plot(workload, plot)
