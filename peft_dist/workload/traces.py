"""How often functions were called: the Azure Functions traces of 2019 (MAF1) and 2021 (MAF2).

https://github.com/Azure/AzurePublicDataset: AzureFunctionsDataset2019.md and AzureFunctionsInvocationTrace2021.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from peft_dist.core.errors import ConfigError
from peft_dist.workload.rows import BadRows, OnError, column, read_rows, seconds, whole

Ints = NDArray[np.int64]

DAY_MINUTES = 24 * 60
MAF1_NAME = "invocations_per_function_md.anon.d{day:02d}.csv"
MAF2_NAME = "AzureFunctionsInvocationTraceForTwoWeeksJan2021.txt"
_SHORT = range(1, 12)
_WINDOW = re.compile(r"(\d+)\.(\d+)\.(\d+)-(\d+)\.(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class Window:
    """Part of a trace, in minutes from its start: ``start`` belongs to it, ``end`` no more."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ConfigError(f"a window from minute {self.start} to {self.end}: it must end after it starts")

    @classmethod
    def parse(cls, text: str) -> Window:
        """A window as the artifact writes it: DAY.HOUR.MINUTE-DAY.HOUR.MINUTE, all counted from 0."""
        match = _WINDOW.fullmatch(text)
        if match is None:
            raise ConfigError(f"the window {text!r} is not DAY.HOUR.MINUTE-DAY.HOUR.MINUTE: for example 0.0.0-0.2.0")
        days, hours, minutes, *end = (int(part) for part in match.groups())
        return cls(days * DAY_MINUTES + hours * 60 + minutes, end[0] * DAY_MINUTES + end[1] * 60 + end[2])

    def num_intervals(self, minutes: int) -> int:
        """Intervals of so many minutes in it. Raises ConfigError when they do not fill it."""
        length = self.end - self.start
        if minutes < 1 or length % minutes:
            raise ConfigError(f"intervals of {minutes} minutes do not fill a window of {length}: use a divisor")
        return length // minutes


@dataclass(frozen=True, slots=True)
class Trace:
    """Calls of functions in the intervals of a window.

    Attributes:
        functions: Ids, sorted, each with at least one call in the window.
        counts: Calls, shape [functions, intervals].
        source: In words, for headers.
        bad: Rows that were skipped.
        short: What is wrong where the file ends before the window, in words; else empty.
    """

    functions: tuple[str, ...]
    counts: Ints
    source: str
    bad: BadRows = field(default_factory=BadRows)
    short: str = ""

    def by_popularity(self) -> Trace:
        """The most called function first; of those called equally often the smaller id (``need_sort``)."""
        order = np.argsort(-self.counts.sum(axis=1), kind="stable")
        names = tuple(self.functions[index] for index in order)
        words = f"{self.source}, sorted by popularity"
        return replace(self, functions=names, counts=self.counts[order], source=words)

    def by_adapter(self, num_adapters: int, stride: int = 1) -> Ints:
        """Calls of adapters, shape [num_adapters, intervals]: function i belongs to adapter (i // stride) % N.

        The artifact's rule. After ``by_popularity`` a larger stride puts more of the hottest functions on one adapter.
        """
        if num_adapters < 1 or stride < 1:
            raise ConfigError(f"{num_adapters} adapters and a stride of {stride}: both must be at least 1")
        # Larger strides than there are functions are alike, and may be more than NumPy's numbers hold.
        adapters = np.arange(len(self.functions)) // min(stride, max(len(self.functions), 1)) % num_adapters
        found = np.zeros((num_adapters, self.counts.shape[1]), dtype=np.int64)
        np.add.at(found, adapters, self.counts)
        return found


def read_maf1(path: Path, window: Window, interval: int = 60, on_error: OnError = "fail") -> Trace:
    """Per-minute counts of 2019.

    Args:
        path: The folder of the public day files (``invocations_per_function_md.anon.d01.csv`` and so on, .gz or not),
            or one such file, which is then the window's only day.
        window: Day 0 is the file d01.
        interval: Minutes of one column of ``counts``.
        on_error: Whether a bad row raises ConfigError or is skipped and noted.
    """
    bad = BadRows()
    found: dict[str, Ints] = {}
    shape = window.num_intervals(interval)
    first, last = window.start // DAY_MINUTES, (window.end - 1) // DAY_MINUTES
    for day in range(first, last + 1):
        part = Window(max(window.start - day * DAY_MINUTES, 0), min(window.end - day * DAY_MINUTES, DAY_MINUTES))
        minutes = np.arange(part.start, part.end) + day * DAY_MINUTES - window.start
        file = _day_file(path, day, only=first == last)
        for name, calls in read_rows(file, partial(_maf1_reader, part), on_error, bad):
            if any(calls):
                counts = found.setdefault(name, np.zeros(shape, dtype=np.int64))
                np.add.at(counts, minutes // interval, calls)
    return _trace(found, f"Azure Functions 2019, {path.name}", window, bad)


def _day_file(path: Path, day: int, *, only: bool) -> Path:
    if not path.is_dir():
        if not only:
            raise ConfigError(f"{path} is one day, the window has several: give the folder of the day files")
        return path
    name = MAF1_NAME.format(day=day + 1)
    for file in (path / name, path / f"{name}.gz"):
        if file.exists():
            return file
    raise ConfigError(f"{path / name} is missing: the window needs day {day}; docs/workloads.md tells where to get it")


def _maf1_reader(window: Window, names: list[str]) -> Callable[[list[str]], tuple[str, list[int]]]:
    """Reads the function's id and its calls in each minute of a part of the day."""
    owner, app, function = (column(names, name) for name in ("HashOwner", "HashApp", "HashFunction"))
    zero = column(names, "1")
    if names[zero:] != [str(minute + 1) for minute in range(len(names) - zero)]:
        raise ValueError("the columns of minutes are not 1, 2, 3 and so on to the end of the row")
    if len(names) - zero < window.end:
        raise ValueError(f"there are {len(names) - zero} minutes, and the window ends at minute {window.end}")

    def read(row: list[str]) -> tuple[str, list[int]]:
        if len(row) != len(names):
            raise ValueError(f"there are {len(row)} fields, not {len(names)}")
        cells = row[zero + window.start : zero + window.end]
        # A row has up to 1,440 of them, and a file some 46,000 rows: what is wrong is looked for afterwards.
        if (joined := "".join(cells)).isdigit() and joined.isascii() and all(map(_SHORT.__contains__, map(len, cells))):
            return f"{row[owner]}/{row[app]}/{row[function]}", [int(cell) for cell in cells]
        calls = [whole(cell, f"minute {window.start + i + 1}") for i, cell in enumerate(cells)]
        return f"{row[owner]}/{row[app]}/{row[function]}", calls

    return read


def read_maf2(path: Path, window: Window, interval: int = 60, on_error: OnError = "fail", at: str = "end") -> Trace:
    """Calls of 2021, one a row.

    Args:
        path: The public file, or the folder that it lies in.
        at: "end": a call counts when it ended, as in the artifact; "start": its duration earlier.
    """
    if at not in ("end", "start"):
        raise ConfigError(f"calls count at their 'end' or 'start', not {at!r}")
    bad = BadRows()
    found: dict[str, Ints] = {}
    shape = window.num_intervals(interval)
    last = 0.0
    for name, moment in read_maf2_calls(path, on_error, bad, at):
        minute = moment / 60
        last = max(last, minute)
        if window.start <= minute < window.end:
            counts = found.setdefault(name, np.zeros(shape, dtype=np.int64))
            counts[int((minute - window.start) // interval)] += 1
    made = _trace(found, f"Azure Functions 2021, {path.name}", window, bad)
    # Of a file that goes on, hardly an interval is without a call.
    if last >= window.end - interval:
        return made
    ends = f"the last call is in minute {last:.0f}, the window ends at {window.end}"
    words = f"{path.name} ends before the window: {ends}. What is asked for comes from the part that is there"
    return replace(made, source=f"{made.source}, {ends}", short=words)


def read_maf2_calls(path: Path, on_error: OnError, bad: BadRows, at: str = "end") -> Iterator[tuple[str, float]]:
    """Function and seconds of every call, in the order of the file."""
    if path.is_dir():
        names = [path / MAF2_NAME, path / f"{MAF2_NAME}.gz"]
        found = next((file for file in names if file.exists()), None)
        if found is None:
            raise ConfigError(f"{names[0]} is missing: docs/workloads.md tells where to get it")
        path = found

    def header(names: list[str]) -> Callable[[list[str]], tuple[str, float]]:
        app, function, end = column(names, "app"), column(names, "func"), column(names, "end_timestamp")
        duration = column(names, "duration")

        def read(row: list[str]) -> tuple[str, float]:
            if len(row) != len(names):
                raise ValueError(f"there are {len(row)} fields, not {len(names)}")
            moment, length = seconds(row[end], "end_timestamp"), seconds(row[duration], "duration")
            return f"{row[app]}/{row[function]}", max(0.0, moment - length) if at == "start" else moment

        return read

    return read_rows(path, header, on_error, bad)


def _trace(found: dict[str, Ints], source: str, window: Window, bad: BadRows) -> Trace:
    names = sorted(name for name, counts in found.items() if counts.any())
    if not names:
        raise ConfigError(f"{source}: no function was called in minutes {window.start} to {window.end}")
    counts = np.stack([found[name] for name in names])
    words = f"{source}, minutes {window.start} to {window.end}, {len(names)} functions, {int(counts.sum())} calls"
    return Trace(tuple(names), counts, words + (f", {bad.count} bad rows skipped" if bad.count else ""), bad)
