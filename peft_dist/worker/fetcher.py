"""Finds and checks adapters (which may mean a download) without holding up the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from peft_dist.core.messages import LoadAdapter
from peft_dist.runner.adapter_source import not_there_in_time
from peft_dist.runner.background import BackgroundCalls, Ended, TimeLimitError

T = TypeVar("T")
# Downloads wait for a network more than they work.
NUM_THREADS = 8


class AdapterFetcher(Generic[T]):
    """Runs ``find`` for each load on other threads; ``fileno()`` is readable when one has ended."""

    def __init__(self, find: Callable[[LoadAdapter], T], time_limit: float | None = None) -> None:
        """``time_limit``: Seconds for one load; None is no limit."""
        self._find = find
        self._time_limit = time_limit
        self._calls: BackgroundCalls[LoadAdapter, T] = BackgroundCalls("adapter-fetcher", NUM_THREADS, time_limit)

    def fileno(self) -> int:
        return self._calls.fileno()

    def start(self, command: LoadAdapter) -> None:
        self._calls.start(command, lambda call: self._find(command))

    def take_found(self) -> list[tuple[LoadAdapter, T | Exception]]:
        """What has ended since the last call."""
        return [(ended.key, self._outcome(ended)) for ended in self._calls.take()]

    def close(self) -> None:
        self._calls.close()

    def _outcome(self, ended: Ended[LoadAdapter, T]) -> T | Exception:
        if isinstance(ended.error, TimeLimitError):
            return not_there_in_time(ended.key.name, ended.key.path, self._time_limit)
        return ended.error if ended.error is not None else ended.result  # type: ignore[return-value]
