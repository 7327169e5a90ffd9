"""Rows of results in CSV, and what they are of in JSON beside it."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_dist.core.errors import ConfigError

Row = dict[str, Any]


def check_folder(folder: Path) -> None:
    """Make it where it is not there. Raises ConfigError where results could not be written to it after a run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"--output {folder} cannot be written: {error.strerror}; name another folder") from error


def check_drawn(folder: Path, names: Sequence[str]) -> None:
    """Raises ConfigError where a folder has none of these CSVs, so that there is nothing to draw."""
    if not any((folder / f"{name}.csv").exists() for name in names):
        files = ", ".join(f"{name}.csv" for name in names)
        raise ConfigError(
            f"--plot: there is no {files} in {folder}: run it first, without --plot, or name its --output"
        )


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """``columns`` first (the artifact's), then whatever else rows have, in the order in which it first occurs."""
    rest = dict.fromkeys(key for row in rows for key in row if key not in columns)
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *rest], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.getvalue(), encoding="utf-8")


def read_csv(path: Path) -> list[Row]:
    """Rows with numbers where there are numbers; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
