"""Workloads in files: JSON lines or CSV, the first line a header that tells where they come from."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

from peft_dist.core.errors import ConfigError
from peft_dist.workload.arrivals import Arrival, Workload
from peft_dist.workload.rows import open_text

FORMAT = 1
COLUMNS = ("time", "adapter", "prompt_tokens", "output_tokens")


def write(workload: Workload, path: Path) -> None:
    """Write JSON lines or, when the name ends in .csv, CSV. Times are written exactly.

    Raises ConfigError when the file cannot be written.
    """
    header = {"peft_dist_workload": FORMAT, "requests": len(workload.arrivals), **workload.source}
    lines = _csv_lines(workload.arrivals, header) if path.suffix == ".csv" else _json_lines(workload.arrivals, header)
    try:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _json_lines(arrivals: Iterable[Arrival], header: dict[str, Any]) -> Iterator[str]:
    yield json.dumps(header) + "\n"
    for arrival in arrivals:
        yield msgspec.json.encode(arrival).decode() + "\n"


def _csv_lines(arrivals: Iterable[Arrival], header: dict[str, Any]) -> Iterator[str]:
    yield f"# {json.dumps(header)}\n{','.join(COLUMNS)}\n"
    for arrival in arrivals:
        row = io.StringIO()
        values = (repr(arrival.time), arrival.adapter or "", arrival.prompt_tokens, arrival.output_tokens)
        csv.writer(row, lineterminator="\n").writerow(values)
        yield row.getvalue()


def read(path: Path) -> Workload:
    """What ``write`` wrote, gzipped or not; a CSV file may lack the header, but not the names of its columns.

    Raises ConfigError with the line of whatever is wrong.
    """
    try:
        with open_text(path) as file:
            header, arrivals = _parse(path, file)
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path}: the file is damaged: {error}") from error
    header.pop("peft_dist_workload", None)
    expected = header.pop("requests", len(arrivals))
    if expected != len(arrivals):
        raise ConfigError(f"{path} has {len(arrivals)} requests, its header says {expected}: it is not complete")
    return Workload(tuple(arrivals), header or {"arrivals": path.name})


def _parse(path: Path, file: IO[str]) -> tuple[dict[str, Any], list[Arrival]]:
    first = file.readline()
    if first.startswith("{"):
        return _header(path, first), list(_numbered(path, file, 2, _from_json))
    named = first.startswith("#")
    header = _header(path, first[1:]) if named else {}
    names = (file.readline() if named else first).strip()
    if names != ",".join(COLUMNS):
        raise ConfigError(f"{path}: the columns are {names[:80]!r}, not {','.join(COLUMNS)}")
    return header, list(_numbered(path, file, 3 if named else 2, _from_csv))


def _header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}:1: the header is no JSON: {error}") from error
    if not isinstance(header, dict) or header.get("peft_dist_workload") != FORMAT:
        raise ConfigError(f"{path}:1: this is no workload of format {FORMAT}: write it with peft-dist workload")
    return header


def _numbered(path: Path, lines: Iterable[str], first: int, parse: Callable[[str], Arrival]) -> Iterator[Arrival]:
    for number, line in enumerate(lines, first):
        try:
            yield parse(line)
        except (ValueError, msgspec.DecodeError) as error:
            raise ConfigError(f"{path}:{number}: {error}") from error


_decoder = msgspec.json.Decoder(Arrival)


def _from_json(line: str) -> Arrival:
    return _decoder.decode(line)


def _from_csv(line: str) -> Arrival:
    row = next(csv.reader([line]))
    if len(row) != len(COLUMNS):
        raise ValueError(f"there are {len(row)} fields, not {len(COLUMNS)}")
    return Arrival(float(row[0]), row[1] or None, int(row[2]), int(row[3]))
