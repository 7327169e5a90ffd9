"""The engine's decisions as lines of JSON."""

from __future__ import annotations

from pathlib import Path

import msgspec

from peft_dist.core.errors import ConfigError
from peft_dist.engine.decisions import Decision


class DecisionLog:
    """Appends every decision to a file, which is whole after each line.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(f"decision_log={str(path)!r} cannot be written: {error}") from error
        self._encoder = msgspec.json.Encoder()

    def __call__(self, decision: Decision) -> None:
        self._file.write(self._encoder.encode(decision) + b"\n")
