"""The loads of the experiments: windows of MAF1 and MAF2, mapped to adapters, with ShareGPT's lengths.

Files are read once: what ``read_ahead`` has read, other processes may be given (``given``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_dist.core.errors import ConfigError
from peft_dist.workload import generator, lengths, synthetic, traces
from peft_dist.workload.arrivals import Workload
from peft_dist.workload.lengths import Filters, Lengths
from peft_dist.workload.rows import OnError
from peft_dist.workload.traces import Trace, Window

SHAREGPT = "ShareGPT_V3_unfiltered_cleaned_split.json"
LENGTHS = "lengths.csv"
# Functions of a synthetic trace. A day's file of 2019 has some 46,000 rows; that of 2021 has far fewer functions.
FUNCTIONS = {"maf1": 46_000, "maf2": 1_000}

# Nothing was published about the trace of 2021 that one could be fitted to.
SYNTHETIC = {"maf2": "synthetic (fitted to 2019's)"}


@dataclass(frozen=True, slots=True)
class Data:
    """Where traces and lengths come from; None: synthetic, and every result says so.

    Attributes:
        maf1, maf2: File or folder in the public format.
        sharegpt: The public JSON, whose tokens ``tokenizer`` (a folder or hub id) counts.
        lengths: A CSV of prompt_tokens,output_tokens in place of it.
        skip_bad: Whether rows that cannot be read are left out, and told of; else they end the experiment.
    """

    maf1: Path | None = None
    maf2: Path | None = None
    sharegpt: Path | None = None
    lengths: Path | None = None
    tokenizer: str | None = None
    skip_bad: bool = False

    @classmethod
    def found(cls, folder: Path | None, tokenizer: str | None = None) -> Data:
        """What of ``maf1/``, ``maf2/``, ShareGPT's JSON and ``lengths.csv`` is in a folder.

        Raises ConfigError where the folder is none, or holds nothing of them.
        """
        if folder is None:
            return cls()
        names = {"maf1": "maf1", "maf2": "maf2", "sharegpt": SHAREGPT, "lengths": LENGTHS}
        there: dict[str, Any] = {key: folder / name for key, name in names.items() if (folder / name).exists()}
        if not there:
            raise ConfigError(f"--data {folder}: there is none of {', '.join(names.values())}; docs/experiments.md")
        if there.get("lengths") is not None:
            there.pop("sharegpt", None)
        return cls(**there, tokenizer=tokenizer)

    @property
    def source(self) -> dict[str, str]:
        """Names of the files, for results: paths differ from machine to machine."""
        given = {"maf1": self.maf1, "maf2": self.maf2, "lengths": self.lengths or self.sharegpt}
        return {key: SYNTHETIC.get(key, "synthetic") if path is None else path.name for key, path in given.items()}


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """One load, as the artifact's scripts ask for it.

    Attributes:
        trace: "maf1" or "maf2".
        window: DAY.HOUR.MINUTE-DAY.HOUR.MINUTE; its hours become the intervals.
        rate: Requests a second of all adapters together.
        requests: How many.
        adapters: How many.
        need_sort, stride: Functions numbered by popularity; functions in a row that share an adapter.
        max_total, ratio: Longest prompt and output together, and by how much outputs are made longer.
        correlated: All adapters share one sequence of gaps, as in the artifact.
    """

    trace: str
    window: str
    rate: float
    requests: int
    adapters: int
    need_sort: bool = False
    stride: int = 1
    max_total: int = 2048
    ratio: float = 1.0
    correlated: bool = False
    seed: int = 0

    def scaled(self, share: float, requests: float = 1.0) -> LoadSpec:
        """Of a cluster of this share of the size; ``requests``: share of the requests that are left of those."""
        count = max(1, round(self.requests * share * requests))
        return replace(self, rate=self.rate * share, requests=count, adapters=max(1, round(self.adapters * share)))


def make(spec: LoadSpec, data: Data, names: Sequence[str] | None = None) -> Workload:
    """The requests. ``names``: Of the adapters where a server has others than adapter0, adapter1 and so on."""
    trace = _trace(spec.trace, spec.window, spec.need_sort, data, spec.seed)
    sizes = _lengths(data, Filters(max_total=spec.max_total, ratio=spec.ratio), spec.seed)
    load = generator.Load(spec.rate, spec.requests, seed=spec.seed, correlated=spec.correlated)
    wanted = [f"adapter{index}" for index in range(spec.adapters)] if names is None else list(names[: spec.adapters])
    if len(wanted) < spec.adapters:
        raise ConfigError(f"the server has {len(wanted)} adapters, the experiment asks for {spec.adapters}")
    return generator.from_trace(wanted, trace, spec.stride, load, sizes)


Read = dict[Any, Trace | Lengths]
"""Traces and lengths by what they were read for."""

_read: Read = {}


def read_ahead(specs: Iterable[LoadSpec], data: Data) -> Mapping[Any, Trace | Lengths]:
    """Read all that these loads need, and say on standard error what is wrong with it. Raises ConfigError."""
    for spec in specs:
        _trace(spec.trace, spec.window, spec.need_sort, data, spec.seed)
        if _has_lengths(data):
            _all_lengths(data)
    return _read


def given(read: Mapping[Any, Trace | Lengths]) -> None:
    """Take what another process has read."""
    _read.update(read)


def tell(trace: Trace | Lengths) -> None:
    """On standard error: rows that were left out, and whether a file ends before its window."""
    for line in trace.bad.lines():
        print(line, file=sys.stderr)
    if isinstance(trace, Trace) and trace.short:
        print(f"warning: {trace.short}", file=sys.stderr)


def _trace(kind: str, window: str, need_sort: bool, data: Data, seed: int) -> Trace:
    key = (kind, window, need_sort, data, seed)
    if key not in _read:
        part = Window.parse(window)
        path = data.maf1 if kind == "maf1" else data.maf2
        if path is None:
            found = synthetic.maf_like(FUNCTIONS[kind], part, seed)
        elif kind == "maf1":
            found = traces.read_maf1(path, part, on_error=on_error(data))
        else:
            found = traces.read_maf2(path, part, on_error=on_error(data))
        tell(found)
        _read[key] = found.by_popularity() if need_sort else found
    made = _read[key]
    assert isinstance(made, Trace)
    return made


def on_error(data: Data) -> OnError:
    return "skip" if data.skip_bad else "fail"


def _lengths(data: Data, filters: Filters, seed: int) -> Lengths:
    return _all_lengths(data).filtered(filters) if _has_lengths(data) else lengths.synthetic("sharegpt", filters, seed)


def _has_lengths(data: Data) -> bool:
    return data.lengths is not None or data.sharegpt is not None


def _all_lengths(data: Data) -> Lengths:
    if data not in _read:
        found = _read_lengths(data)
        tell(found)
        _read[data] = found
    made = _read[data]
    assert isinstance(made, Lengths)
    return made


def _read_lengths(data: Data) -> Lengths:
    if data.lengths is not None:
        # An output of no token is not wrong: it is too short, as some others are.
        return lengths.read_csv(data.lengths, on_error(data), least=0)
    assert data.sharegpt is not None
    if data.tokenizer is None:
        raise ConfigError(f"{data.sharegpt} has texts: name the model's --tokenizer to count their tokens")
    from peft_dist.cli_generate import token_counter

    return lengths.read_sharegpt(data.sharegpt, token_counter(data.tokenizer), on_error(data))
