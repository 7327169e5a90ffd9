"""Whether there is an orchestrator to work for, and how long a worker waits for another one."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Vigil:
    """An orchestrator is gone when somebody says so (``lose``), or, with a limit to its silence, when that has passed.

    The worker is an orphan then: ``check`` tells it once, and unless it is adopted in time, ``end`` is called, whatever
    the worker does meanwhile. Where somebody would say so, silence alone never ends it: the orchestrator is there, and
    may go on. Every method may be called from any thread.
    """

    def __init__(
        self,
        silence: float | None,
        orphan_timeout: float | None,
        end: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        is_watched: bool = False,
    ) -> None:
        """
        Args:
            silence: Seconds without a word, None for any number.
            orphan_timeout: Seconds until an orphan ends; None: at once.
            end: Ends the process.
            clock: Seconds from any origin, never running backwards.
            is_watched: Somebody says when the orchestrator's process has ended.
        """
        self._silence = silence
        self._orphan_timeout = orphan_timeout
        self._end = end
        self._clock = clock
        self._is_watched = is_watched
        self._is_silent = False
        self._lock = threading.Lock()
        self._last_word = clock()
        self._timer: threading.Timer | None = None
        self._untold = False
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # How many orchestrators there were: what is said of an earlier one no longer matters.
        self.generation = 0
        self.on_loss: Callable[[], None] = lambda: None

    def fileno(self) -> int:
        """A file descriptor that is readable when ``check`` has something to tell."""
        return self._fd

    @property
    def is_orphaned(self) -> bool:
        return self._timer is not None or self._is_silent

    def hear(self) -> None:
        """The orchestrator has said something."""
        self._last_word = self._clock()

    def lose(self, generation: int, reason: str) -> None:
        """The orchestrator of this generation is gone."""
        if self._orphan_timeout is None:
            if generation == self.generation:
                self._end()
            return
        with self._lock:
            if generation != self.generation or self._timer is not None:
                return
            self._timer = threading.Timer(self._orphan_timeout, self._expire, (generation,))
            self._timer.daemon = True
            self._timer.start()
            self._untold = True
            os.eventfd_write(self._fd, 1)
        logger.error("%s: this worker waits %g s for another one", reason, self._orphan_timeout)
        self.on_loss()

    def check(self) -> bool:
        """Whether the orchestrator was found to be gone since the last call. After what it said was taken in."""
        if self._silence is not None and self._clock() >= self._last_word + self._silence:
            self._note_silence(f"the orchestrator has been silent for {self._silence:g} s")
        with self._lock:
            gone, self._untold = self._untold, False
            if gone:
                os.eventfd_read(self._fd)
        return gone

    def _note_silence(self, reason: str) -> None:
        if not self._is_watched:
            self.lose(self.generation, reason)
            return
        with self._lock:
            if self._is_silent or self._timer is not None:
                return
            self._is_silent = self._untold = True
            os.eventfd_write(self._fd, 1)
        logger.error("%s: its requests are dropped, until it makes this worker another one", reason)
        self.on_loss()

    def timeout_ms(self) -> int | None:
        """For how long the orchestrator may still be silent; None: nobody counts."""
        if self._silence is None or self.is_orphaned:
            return None
        return max(0, math.ceil((self._last_word + self._silence - self._clock()) * 1e3))

    def adopted(self) -> int:
        """There is another orchestrator; returns its generation."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._untold:
                os.eventfd_read(self._fd)
            self._untold = self._is_silent = False
            self._last_word = self._clock()
            self.generation += 1
            return self.generation

    def close(self) -> None:
        """Wait for nobody any more."""
        self.adopted()
        os.close(self._fd)

    def _expire(self, generation: int) -> None:
        with self._lock:
            if generation != self.generation or self._timer is None:
                return
        logger.error("no orchestrator came within %g s: this worker ends", self._orphan_timeout)
        self._end()
