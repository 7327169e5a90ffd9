"""Calls on threads of their own, each with a time limit, whose ends a loop can wait for."""

from __future__ import annotations

import os
import queue
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from peft_dist.kernels.threads import use_one_thread

K = TypeVar("K")
T = TypeVar("T")


class TimeLimitError(Exception):
    """A call has passed its time limit. Its thread may be stuck, but can do no harm any more."""


@dataclass(frozen=True, slots=True)
class Ended(Generic[K, T]):
    """A call that has ended, with what ``work`` returned or raised.

    Attributes:
        seconds: Since ``start``.
    """

    key: K
    result: T | None
    error: Exception | None
    seconds: float


class Call:
    """One call, as its ``work`` sees it."""

    def __init__(self, number: int, lock: threading.Condition) -> None:
        self.number = number
        self.asked_at = time.monotonic()
        self.deadline: float | None = None
        self._lock = lock
        self._is_over = False

    def commit(self) -> None:
        """To be called before effects that others see: from then on the limit does not count.

        Raises:
            TimeLimitError: it has passed already, and whoever waited has been told.
        """
        with self._lock:
            if self._is_over:
                raise TimeLimitError
            self.deadline = None

    def end(self) -> bool:
        """Whether it is the first end; the caller holds the lock."""
        was_over, self._is_over = self._is_over, True
        return not was_over


Work = Callable[[Call], T]


class BackgroundCalls(Generic[K, T]):
    """Up to ``num_threads`` calls at once, in the order of ``start``; a thread that is stuck is replaced.

    ``start``, ``take`` and ``close`` never wait for a call. With several lanes, each has so many threads of its own:
    no call waits for one in another lane.
    """

    def __init__(self, name: str, num_threads: int, time_limit: float | None = None, num_lanes: int = 1) -> None:
        """``time_limit``: Seconds from the moment at which a thread takes the call up; None is no limit."""
        self._name = name
        self._num_threads = num_threads
        self._time_limit = time_limit
        self._lock = threading.Condition()
        self._lanes: list[queue.SimpleQueue[tuple[Call, K, Work[T]] | None]]
        self._lanes = [queue.SimpleQueue() for _ in range(num_lanes)]
        self._running: dict[int, tuple[Call, K, int]] = {}
        self._ended: list[Ended[K, T]] = []
        self._num_started = 0
        self._is_closed = False
        self._wake_read, self._wake_write = os.pipe()

    def fileno(self) -> int:
        """Readable while ``take`` has something."""
        return self._wake_read

    def start(self, key: K, work: Work[T], lane: int = 0) -> None:
        if not self._num_started:
            for each in range(len(self._lanes)):
                for _ in range(self._num_threads):
                    self._start_thread(self._run, each)
            if self._time_limit is not None:
                self._start_thread(self._watch)
        self._num_started += 1
        self._lanes[lane].put((Call(self._num_started, self._lock), key, work))

    def take(self) -> list[Ended[K, T]]:
        """What has ended since the last call."""
        if not self._ended:
            return []
        with self._lock:
            ended, self._ended = self._ended, []
            os.read(self._wake_read, 1)
        return ended

    def close(self) -> None:
        """Let threads go as soon as their call ends; nothing is told any more."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._ended = []
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._lock.notify_all()
        for lane in self._lanes:
            for _ in range(self._num_threads):
                lane.put(None)

    def _start_thread(self, target: Callable[..., None], *arguments: int) -> None:
        # Daemons: a file system that hangs must not hold up the end of the process.
        threading.Thread(target=target, args=arguments, name=self._name, daemon=True).start()

    def _run(self, lane: int) -> None:
        use_one_thread()
        while (item := self._lanes[lane].get()) is not None and self._serve(lane, *item):
            # Nothing of a call that has ended may be kept alive while this thread waits for the next.
            del item

    def _serve(self, lane: int, call: Call, key: K, work: Work[T]) -> bool:
        """Whether this thread is to go on: not after its call has passed its limit, for it was replaced then."""
        with self._lock:
            if self._is_closed:
                return False
            if self._time_limit is not None:
                call.deadline = time.monotonic() + self._time_limit
            self._running[call.number] = (call, key, lane)
            self._lock.notify_all()
        result: T | None = None
        failure: Exception | None = None
        try:
            result = work(call)
        except Exception as error:  # noqa: BLE001  Whatever it is must reach whoever waits for this call.
            failure = error
        with self._lock:
            return self._tell(call, key, result, failure)

    def _tell(self, call: Call, key: K, result: T | None, error: Exception | None) -> bool:
        """Whether this is how the call ended; the caller holds the lock."""
        if not call.end():
            return False
        del self._running[call.number]
        if self._is_closed:
            return False
        self._ended.append(Ended(key, result, error, time.monotonic() - call.asked_at))
        if len(self._ended) == 1:
            # Last: whoever is woken looks for what has ended before it asks for the lock.
            os.write(self._wake_write, b"\0")
        return True

    def _watch(self) -> None:
        """End calls that take too long."""
        with self._lock:
            while not self._is_closed:
                now = time.monotonic()
                limited = [
                    (call.deadline, call, key, lane) for call, key, lane in self._running.values() if call.deadline
                ]
                for deadline, call, key, lane in limited:
                    if deadline <= now and self._tell(call, key, None, TimeLimitError()):
                        self._start_thread(self._run, lane)
                pending = [deadline for deadline, _, _, _ in limited if deadline > now]
                del limited
                # Longer than any platform can wait is as good as for ever.
                self._lock.wait(min(min(pending) - now, threading.TIMEOUT_MAX) if pending else None)


def call_in_time(name: str, work: Callable[[], T], time_limit: float | None) -> T:
    """Wait for one call on a thread of its own, for at most ``time_limit`` seconds (None: for ever).

    Raises:
        TimeLimitError: it took longer. Otherwise whatever ``work`` raises.
    """
    calls: BackgroundCalls[str, T] = BackgroundCalls(name, 1, time_limit)
    try:
        calls.start(name, lambda call: work())
        select.select([calls.fileno()], [], [])
        (ended,) = calls.take()
    finally:
        calls.close()
    if ended.error is not None:
        raise ended.error
    return ended.result  # type: ignore[return-value]
