"""How a worker ended, told past the launcher between, which has a status of its own."""

from __future__ import annotations

import contextlib
from pathlib import Path

EXIT_ORPHANED = 3
EXIT_FENCED = 4
EXIT_REFUSED = 5
_NAME = "status"


def tell_status(folder: Path, status: int) -> None:
    """Leave the exit status where whoever started the worker looks for it; nothing happens when that is gone."""
    with contextlib.suppress(OSError):
        (folder / _NAME).write_text(f"{status}\n")


def told_status(folder: Path) -> int | None:
    """What the worker of this folder told; None when it could not."""
    try:
        return int((folder / _NAME).read_text())
    except (OSError, ValueError):
        return None
