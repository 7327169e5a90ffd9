"""Rows of CSV files, plain or gzipped, and what happens to those that cannot be read."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, TypeVar, cast

from peft_dist.core.errors import ConfigError

T = TypeVar("T")
OnError = Literal["fail", "skip"]
_SHOWN = 20
# What fits into 63 bits.
_MOST_DIGITS = 18
_GZIP = b"\x1f\x8b"


@dataclass(slots=True)
class BadRows:
    """Rows that were skipped: how many of each file, and what was wrong with the first of them, by file and line."""

    files: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    def add(self, file: str, message: str) -> None:
        self.files[file] = self.files.get(file, 0) + 1
        if len(self.examples) < _SHOWN:
            self.examples.append(message)

    def lines(self) -> Iterator[str]:
        """What is told of them."""
        for message in self.examples:
            yield f"skipped: {message}"
        if self.count > len(self.examples):
            yield f"skipped: {self.count - len(self.examples)} more bad rows"


def open_text(path: Path) -> IO[str]:
    """A text file to read; gzip is recognised by its first bytes, not by its name. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == _GZIP
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if zipped:
        return cast("IO[str]", gzip.open(path, "rt", encoding="utf-8", errors="replace", newline=""))
    return path.open(encoding="utf-8", errors="replace", newline="")


def read_rows(
    path: Path,
    parse_header: Callable[[list[str]], Callable[[list[str]], T]],
    on_error: OnError,
    bad: BadRows,
) -> Iterator[T]:
    """What the rows of a CSV file say.

    Args:
        path: The file; its first row names the columns.
        parse_header: Makes, from the names, what reads a row; both raise ValueError, whose text says what is wrong.
        on_error: "fail": the first bad row raises ConfigError; "skip": it is noted in ``bad`` and left out.
    """
    with open_text(path) as file:
        # A carriage return or quote in the middle of a damaged line must not swallow those that follow.
        lines = csv.reader(file, quoting=csv.QUOTE_NONE)
        try:
            names = next(lines, None)
            if names is None:
                raise ConfigError(f"{path} is empty: its first row must name its columns")
            try:
                parse = parse_header([name.strip() for name in names])
            except ValueError as error:
                raise ConfigError(f"{path}:1: {error}") from error
            for row in lines:
                if not row:
                    continue
                try:
                    value = parse(row)
                except ValueError as error:
                    message = f"{path}:{lines.line_num}: {error}"
                    if on_error == "fail":
                        raise ConfigError(f"{message}; mend the file, or have bad rows skipped") from error
                    bad.add(path.name, message)
                else:
                    yield value
        except (OSError, EOFError, csv.Error) as error:
            raise ConfigError(f"{path}:{lines.line_num + 1}: the file is damaged: {error}") from error


def unquoted(fields: list[str]) -> list[str]:
    """The fields of a row of ``read_rows`` where they may be quoted, as spreadsheets write them.

    A quote counts within its line alone: one that is not closed spoils no other line.
    """
    return next(csv.reader([",".join(fields)])) if any('"' in one for one in fields) else fields


def column(names: Sequence[str], *wanted: str) -> int:
    """Where the first of ``wanted`` stands. Raises ValueError."""
    for name in wanted:
        if name in names:
            return names.index(name)
    raise ValueError(f"there is no column {' or '.join(map(repr, wanted))} among {', '.join(names[:8])}")


def whole(text: str, what: str, least: int = 0) -> int:
    """A whole number of ``least`` or more. Raises ValueError that says ``what`` is none."""
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS) or int(text) < least:
        raise ValueError(f"{what} is {text[:40]!r}, not a whole number of {least} or more")
    return int(text)


def seconds(text: str, what: str) -> float:
    """Seconds, 0 or more. Raises ValueError that says ``what`` is none."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"{what} is {text[:40]!r}, not a number of seconds")
    return value
