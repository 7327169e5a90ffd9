"""Workloads made by options: those of ``peft-dist workload write``, which ``peft-dist simulate`` has too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peft_dist.core.errors import ConfigError

if TYPE_CHECKING:
    from peft_dist.workload.arrivals import Workload
    from peft_dist.workload.lengths import CountTokens, Filters, Lengths
    from peft_dist.workload.rows import BadRows, OnError
    from peft_dist.workload.traces import Trace

HUB = "hub"

_ADAPTERS = 8

# What the commands' help says of each; their defaults are those of WorkloadOptions.
Adapters = Annotated[int | None, typer.Option(min=1, help="How many; 8, or as many as there are names.")]
AdapterName = Annotated[str, typer.Option(help="Name of adapter {} from 0 on; or all names: sql,json.")]
Popularity = Annotated[str, typer.Option(help="trace, uniform or zipf.")]
Zipf = Annotated[float, typer.Option(help="Exponent of zipf.")]
Maf1 = Annotated[Path | None, typer.Option(help="Azure Functions 2019: a day's file, or their folder.")]
Maf2 = Annotated[Path | None, typer.Option(help="Azure Functions 2021: the file, or its folder.")]
Functions = Annotated[int, typer.Option(min=1, help="Of the synthetic trace, where no file is given.")]
Window = Annotated[str, typer.Option(help="Part of the trace: DAY.HOUR.MINUTE-DAY.HOUR.MINUTE.")]
Interval = Annotated[int, typer.Option(min=1, help="Minutes during which the shares stay as they are.")]
NeedSort = Annotated[bool, typer.Option("--need-sort", help="Number functions by popularity.")]
Stride = Annotated[int, typer.Option(min=1, help="Functions in a row that share an adapter.")]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Leave them out and say so.")]
Cv = Annotated[float, typer.Option(help="Of the gaps of an adapter's requests; 1: Poisson.")]
Correlated = Annotated[bool, typer.Option("--correlated", help="One stream of gaps, as the artifact.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all that is random.")]
SyntheticLengths = Annotated[str, typer.Option(help="Synthetic ones: sharegpt, azure-conv or azure-code.")]
LengthsCsv = Annotated[Path | None, typer.Option(help="A file with prompt_tokens,output_tokens.")]
ShareGPT = Annotated[str | None, typer.Option(help="ShareGPT's JSON; 'hub' downloads it.")]
Tokenizer = Annotated[str | None, typer.Option(help="Folder or hub id, to count ShareGPT's tokens.")]
FixedLengths = Annotated[str | None, typer.Option(metavar="PROMPT,OUTPUT", help="Every request alike.")]
MaxPrompt = Annotated[int, typer.Option(help="Longer ones are dropped, in tokens.")]
MaxTotal = Annotated[int, typer.Option(help="Prompt and output together.")]
Ratio = Annotated[float, typer.Option(help="Times as long, by longer outputs, to at most --max-total.")]


@dataclass(frozen=True)
class WorkloadOptions:
    """One workload; each attribute is the option of its name.

    It has no slots, because the commands take their defaults from the class.
    """

    rate: float
    requests: int
    adapters: int | None = None
    adapter_name: str = "adapter-{}"
    popularity: str = "trace"
    zipf: float = 1.0
    maf1: Path | None = None
    maf2: Path | None = None
    functions: int = 1000
    window: str = "0.0.0-0.2.0"
    interval: int = 60
    need_sort: bool = False
    stride: int = 1
    skip_bad_rows: bool = False
    cv: float = 1.0
    correlated: bool = False
    seed: int = 0
    lengths: str = "sharegpt"
    lengths_csv: Path | None = None
    sharegpt: str | None = None
    tokenizer: str | None = None
    fixed_lengths: str | None = None
    max_prompt: int = 1024
    max_total: int = 2048
    ratio: float = 1.0

    @classmethod
    def asked(cls, given: Mapping[str, Any]) -> list[str]:
        """Options of a command (by name, such as its ``locals()``) that are not as they are by default, as written."""
        defaults = {one.name: None if one.default is MISSING else one.default for one in fields(cls)}
        return [f"--{name.replace('_', '-')}" for name, default in defaults.items() if given[name] != default]


def make(asked: WorkloadOptions) -> Workload:
    """A workload; bad rows that are skipped are told on standard error.

    Raises ConfigError for options that contradict each other and files that cannot be read: it names them.
    """
    from peft_dist.workload import arrivals, generator
    from peft_dist.workload.lengths import Filters

    on_error: OnError = "skip" if asked.skip_bad_rows else "fail"
    filters = Filters(max_prompt=asked.max_prompt, max_total=asked.max_total, ratio=asked.ratio)
    names = _names(asked.adapter_name, asked.adapters)
    load = generator.Load(asked.rate, asked.requests, asked.cv, asked.seed, asked.correlated)
    sizes = _lengths(asked, filters, on_error)
    if asked.popularity == "trace":
        trace = _trace(asked, on_error)
        _tell(trace.bad)
        if trace.short:
            typer.echo(f"warning: {trace.short}", err=True)
        trace = trace.by_popularity() if asked.need_sort else trace
        made = generator.from_trace(names, trace, asked.stride, load, sizes)
    elif asked.popularity not in ("uniform", "zipf"):
        raise ConfigError(f"--popularity {asked.popularity!r} is unknown: use trace, uniform or zipf")
    elif asked.maf1 or asked.maf2:
        raise ConfigError("--maf1 and --maf2 are for --popularity trace")
    else:
        exponent = asked.zipf if asked.popularity == "zipf" else 0.0
        words = f"Zipf ({exponent:g})" if exponent else "uniform"
        made = generator.from_shares(names, arrivals.zipf(len(names), exponent), words, load, sizes)
    _tell(sizes.bad)
    return made


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
            f"--adapter-name {template!r} names {count} adapters alike: put {{}} where the number belongs, give all "
            "names, separated by commas, or --adapters 1 for one"
        )
    return names


def _trace(asked: WorkloadOptions, on_error: OnError) -> Trace:
    from peft_dist.workload import synthetic, traces

    part = traces.Window.parse(asked.window)
    if asked.maf1 and asked.maf2:
        raise ConfigError("--maf1 and --maf2 are two traces: give one")
    if asked.maf1:
        return traces.read_maf1(asked.maf1, part, asked.interval, on_error)
    if asked.maf2:
        return traces.read_maf2(asked.maf2, part, asked.interval, on_error)
    return synthetic.maf_like(asked.functions, part, asked.seed, asked.interval)


def _lengths(asked: WorkloadOptions, filters: Filters, on_error: OnError) -> Lengths:
    from peft_dist.workload import lengths

    fixed, sharegpt = asked.fixed_lengths, asked.sharegpt
    if sum(option is not None for option in (asked.lengths_csv, sharegpt, fixed)) > 1:
        raise ConfigError("--lengths-csv, --sharegpt and --fixed-lengths exclude each other: give one")
    if asked.lengths_csv is not None:
        return lengths.read_csv(asked.lengths_csv, on_error).filtered(filters)
    if fixed is not None:
        prompt, _, output = fixed.partition(",")
        if not (prompt.isdigit() and output.isdigit()):
            raise ConfigError(f"--fixed-lengths {fixed!r} is not PROMPT,OUTPUT: write for example 128,64")
        return lengths.fixed(int(prompt), int(output))
    if sharegpt is None:
        return lengths.synthetic(asked.lengths, filters, asked.seed)
    count = token_counter(asked.tokenizer)
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
    for line in bad.lines():
        typer.echo(line, err=True)
