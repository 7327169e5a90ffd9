"""A file of what engines, or the orchestrator, were told and decided, for replays (docs/simulator.md)."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec

from peft_dist.core.errors import ConfigError

logger = logging.getLogger(__name__)

VARIABLE = "PEFT_DIST_RECORD"
MAX_BYTES = 256 << 20
FULL = f"the file has its {MAX_BYTES >> 20} MiB"


class RecordEntry(msgspec.Struct, frozen=True, tag=str.lower, tag_field="is"):
    """A line of a recording, which names what it is."""


class End(RecordEntry, frozen=True):
    """What follows is not recorded."""

    why: str


class Recorder:
    """Hands on entries, in order, until it has ended."""

    def __init__(self, write: Callable[[Any], None]) -> None:
        self._write = write
        self._has_ended = False

    def note(self, entry: RecordEntry) -> None:
        if not self._has_ended:
            self._write(entry)

    def end(self, why: str) -> None:
        self.note(End(why))
        self._has_ended = True


def recording_folder() -> Path | None:
    """Where the environment asks for recordings; None: nowhere."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) if folder else None


class RecordFile:
    """Lines of JSON in a new file of a folder, which is made, up to a bound. It holds prompts and answers as token ids.

    Args:
        what: The beginning of the file's name.
        full: The line that ends a recording which does not fit.

    Attributes:
        path: The file.

    Raises:
        ConfigError: it cannot be made.
    """

    def __init__(self, folder: Path, what: str, full: msgspec.Struct, max_bytes: int = MAX_BYTES) -> None:
        self._encoder = msgspec.json.Encoder()
        self._end = self._encoder.encode(full) + b"\n"
        self._left = max_bytes - len(self._end)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.path, self._file = _new_file(folder, f"{what}-{os.getpid()}")
        except OSError as error:
            raise ConfigError(
                f"{VARIABLE}={str(folder)!r}: no recording can be made there, give a folder: {error}"
            ) from error

    def __call__(self, entry: msgspec.Struct) -> None:
        """Append an entry; what does not fit any more is lost, and so is all that follows."""
        if self._file.closed:
            return
        line = self._encoder.encode(entry) + b"\n"
        self._left -= len(line)
        try:
            self._file.write(line if self._left >= 0 else self._end)
        except OSError as error:
            logger.warning("the recording %s ends here: %s", self.path, error)
            self.close()
        if self._left < 0:
            self.close()

    def close(self) -> None:
        """Give the file up; entries that come later are lost."""
        self._file.close()


def _new_file(folder: Path, what: str) -> tuple[Path, FileIO]:
    """The first of its kind that is not there yet, open: a process may have several engines."""
    paths = (folder / f"{what}-{number}.jsonl" for number in itertools.count())
    while True:
        path = next(paths)
        with contextlib.suppress(FileExistsError):
            return path, FileIO(path, "x")
