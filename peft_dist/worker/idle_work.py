"""When a replica without work does what would hold up requests later."""

from __future__ import annotations

import math
from collections.abc import Callable

QUIET_SECONDS = 1.0
"""Without requests, before there is no hurry."""
_FAR = 2.0
FIRST_GUESS = 0.25
"""Seconds that a piece takes, before one was seen."""


class IdleWork:
    """A little at a time: at once before the first request, and after others once none came for ``QUIET_SECONDS``.

    A little takes 0.1 to 1 s (a captured step, a measured product), for which a request that comes meanwhile waits. In
    the short gaps of a load that leaves some every request would meet one, until nothing is left to do.
    """

    def __init__(
        self,
        do_some: Callable[[], bool],
        is_some_left: Callable[[], bool],
        clock: Callable[[], float],
        tell: Callable[[bool, float], None],
    ) -> None:
        """
        Args:
            do_some: Whether something was done; False: nothing is left.
            is_some_left: The same, without doing it.
            clock: Seconds.
            tell: Hears whether the replica is warm, whenever that changes, before which it is not; and while it is not
                what a piece of the work takes, in seconds, when that is another.
        """
        self._do_some = do_some
        self._is_some_left = is_some_left
        self._clock = clock
        self._tell = tell
        self._is_warm = False
        self._pause = 0.0
        self._last_piece = FIRST_GUESS
        self._quiet_at = -math.inf
        self._may_be_left = True

    def note(self, *, worked: bool, changed: bool) -> None:
        """A round is over: whether requests ran in it, and whether commands or adapters came, which may bring work."""
        if worked:
            self._quiet_at = self._clock() + QUIET_SECONDS
        self._may_be_left |= worked or changed

    def go_on(self) -> bool:
        """Do some of it, if it is time; whether something was done. For when there is no request."""
        if not self._may_be_left or self._clock() < self._quiet_at:
            return False
        began = self._clock()
        self._may_be_left = self._do_some()
        if self._may_be_left:
            self._last_piece = self._clock() - began
        self._say(is_warm=not self._may_be_left)
        return self._may_be_left

    def expect_more(self) -> None:
        """An adapter is about to be served, which may bring work."""
        self._may_be_left = True
        if self._is_some_left():
            self._say(is_warm=False)

    def tell_anew(self) -> None:
        """Whoever listens from now on knows nothing yet."""
        self._tell(self._is_warm, self._pause)

    def _say(self, *, is_warm: bool) -> None:
        pause = 0.0 if is_warm else self._last_piece
        # No two pieces take the same time: what decides where a request goes is whether it is more or less by far.
        is_another = not self._pause / _FAR <= pause <= self._pause * _FAR
        if is_warm != self._is_warm or is_another:
            self._is_warm, self._pause = is_warm, pause
            self._tell(is_warm, pause)

    def limit(self, timeout_ms: int | None) -> int | None:
        """For how long to wait, after ``go_on``, where without this it would be ``timeout_ms``; None is without end."""
        if not self._may_be_left:
            return timeout_ms
        left = max(0, math.ceil(1e3 * (self._quiet_at - self._clock())))
        return left if timeout_ms is None else min(timeout_ms, left)
