"""One deadline on the event loop, and whether the loop was there to meet it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Timer:
    """Calls back once at the earliest time that it was armed for, in seconds of the loop's clock.

    What ``pulse`` has to tell, it tells before.
    """

    def __init__(self, callback: Callable[[], None], pulse: Pulse | None = None) -> None:
        self._callback = callback
        self._pulse = pulse
        self._loop = asyncio.get_running_loop()
        self._handle: asyncio.Handle | None = None
        # uvloop's handles do not tell it where it is due already.
        self._when = math.inf
        self._cancelled = False

    @property
    def is_armed(self) -> bool:
        return self._handle is not None

    def arm(self, when: float) -> None:
        """Call at ``when`` at the latest; infinity is never."""
        if self._cancelled or not math.isfinite(when):
            return
        if self._handle is not None:
            if self._when <= when:
                return
            self._handle.cancel()
        self._when = when
        self._handle = self._loop.call_at(when, self._fire)

    def cancel(self) -> None:
        """Never call again."""
        self._cancelled = True
        if self._handle is not None:
            self._handle.cancel()

    def _fire(self) -> None:
        self._handle = None
        if self._pulse is not None:
            self._pulse.look()
        self._callback()


class Pulse:
    """Tells that this process was not running (it was stopped, or something held up the loop): whatever came meanwhile
    is not read yet. Whoever acts on time that has passed looks first; a beat looks for all others."""

    SECONDS = 0.1
    # What a busy loop may be late without anything being wrong with it.
    PAUSE = 0.5

    def __init__(self, paused: Callable[[], None]) -> None:
        self._paused = paused
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + self.SECONDS
        self._handle = self._loop.call_at(self._due, self._beat)

    def stop(self) -> None:
        self._handle.cancel()

    def look(self) -> None:
        """Tell now, if it is so and was not told yet."""
        now = self._loop.time()
        if now > self._due + self.PAUSE:
            self._due = now
            self._paused()

    def _beat(self) -> None:
        self.look()
        self._due = self._loop.time() + self.SECONDS
        self._handle = self._loop.call_at(self._due, self._beat)
