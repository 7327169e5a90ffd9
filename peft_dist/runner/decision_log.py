"""The engine's decisions as lines of JSON."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from peft_dist.core.errors import ConfigError
from peft_dist.engine.decisions import Decision

logger = logging.getLogger(__name__)


class DecisionLog:
    """Appends every decision to a file; it grows by some hundred bytes a step.

    A file that can no longer be written ends the log, not the serving.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._encoder = msgspec.json.Encoder()
        self._has_ended = False
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(f"decision_log={str(path)!r} cannot be written: {error}") from error

    def close(self) -> None:
        """Give the file up; decisions that are told later are lost."""
        self._has_ended = True
        self._file.close()

    def __call__(self, decision: Decision) -> None:
        if self._has_ended:
            return
        try:
            self._file.write(self._encoder.encode(decision) + b"\n")
        except OSError as error:
            self._has_ended = True
            logger.warning("decision_log %s ends here: %s", self._file.name, error)
