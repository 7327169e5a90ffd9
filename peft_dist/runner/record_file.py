"""A file of what engines were told and answered, for replays (docs/simulator.md)."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from peft_dist.core.errors import ConfigError

logger = logging.getLogger(__name__)

VARIABLE = "PEFT_DIST_RECORD"
MAX_BYTES = 256 << 20


def recording_folder() -> Path | None:
    """Where the environment asks for recordings; None: nowhere."""
    folder = os.environ.get(VARIABLE)
    return Path(folder) if folder else None


class RecordFile:
    """Lines of JSON in a new file of a folder, up to a bound. It holds prompts and answers as token ids.

    Attributes:
        path: The file.

    Raises:
        ConfigError: it cannot be made.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self._encoder = msgspec.json.Encoder()
        self._left = max_bytes
        number = 0
        while True:
            self.path = folder / f"engine-{os.getpid()}-{number}.jsonl"
            try:
                self._file = self.path.open("xb", buffering=0)
                break
            except FileExistsError:
                number += 1
            except OSError as error:
                raise ConfigError(f"{VARIABLE}={str(folder)!r}: {self.path.name} cannot be made: {error}") from error

    def __call__(self, entry: msgspec.Struct) -> None:
        """Append an entry; what does not fit any more is lost, and so is all that follows."""
        line = self._encoder.encode(entry) + b"\n"
        if self._left < len(line):
            self.close()
        if self._file.closed:
            return
        self._left -= len(line)
        try:
            self._file.write(line)
        except OSError as error:
            logger.warning("the recording %s ends here: %s", self.path, error)
            self.close()

    def close(self) -> None:
        """Give the file up; entries that come later are lost."""
        self._left = -1
        self._file.close()
