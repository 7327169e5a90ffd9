"""One deadline on the event loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Timer:
    """Calls back once at the earliest time that it was armed for, in seconds of the loop's clock."""

    def __init__(self, callback: Callable[[float], None]) -> None:
        """``callback`` gets the seconds by which it is late."""
        self._callback = callback
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
        self._handle = self._loop.call_at(when, self._fire, when)

    def cancel(self) -> None:
        """Never call again."""
        self._cancelled = True
        if self._handle is not None:
            self._handle.cancel()

    def _fire(self, when: float) -> None:
        self._handle = None
        self._callback(max(self._loop.time() - when, 0.0))
