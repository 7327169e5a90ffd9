"""Finds adapters (which may mean a download) without holding up the engine."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

from peft_dist.core.messages import LoadAdapter

Found = tuple[LoadAdapter, Path | Exception]


class AdapterFetcher:
    """Runs ``find`` for each load on a thread of its own; ``fileno()`` is readable when one has ended.

    Reading the files and changing the model stay with the engine's thread, between two steps.
    """

    def __init__(self, find: Callable[[LoadAdapter], Path]) -> None:
        self._find = find
        self._found: queue.SimpleQueue[Found] = queue.SimpleQueue()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)

    def fileno(self) -> int:
        return self._wake_read

    def start(self, command: LoadAdapter) -> None:
        # A daemon: a download must not hold up the end of the process.
        threading.Thread(target=self._run, args=(command,), name=f"find-{command.name}", daemon=True).start()

    def take_found(self) -> list[Found]:
        """What has ended since the last call."""
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return []
        found = []
        while not self._found.empty():
            found.append(self._found.get())
        return found

    def _run(self, command: LoadAdapter) -> None:
        try:
            outcome: Path | Exception = self._find(command)
        except Exception as error:  # noqa: BLE001  Whatever it is must reach whoever waits for this load.
            outcome = error
        self._found.put((command, outcome))
        os.write(self._wake_write, b"\0")
