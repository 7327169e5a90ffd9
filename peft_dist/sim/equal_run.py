"""Equal decode steps of one simulated replica, under way as one event."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable

import msgspec

from peft_dist.core.messages import ReplicaStats, SequenceProgress
from peft_dist.engine.advance import Advance, Stretch
from peft_dist.engine.engine import Engine
from peft_dist.engine.reports import stats_of
from peft_dist.sim.executor import TOKEN, SimExecutor
from peft_dist.sim.unread import EqualReports


class EqualRun:
    """Begins, cuts short and ends them. The engine is not touched before the end.

    Attributes:
        number: Of the last one; it grows with every cut, so that who waits for an end knows if it is the right one.
        num_steps: That were taken so.
    """

    def __init__(self, engine: Engine, executor: SimExecutor, host_seconds: float, least_seconds: float) -> None:
        """``host_seconds`` follow each step; a round takes ``least_seconds`` at least."""
        self._engine = engine
        self._executor = executor
        self._host = host_seconds
        self._least = least_seconds
        self.advance = Advance(engine, TOKEN)
        self._told: set[str] = set()
        self._stretch: Stretch | None = None
        self._starts: list[float] = []
        self._ends: list[float] = []
        self._free: list[float] = []
        self._times: list[float] = []
        self._tells = False
        self.number = 0
        self.num_steps = 0

    @property
    def is_on(self) -> bool:
        return self._stretch is not None

    @property
    def ends_at(self) -> float:
        return self._ends[-1]

    def told(self, progress: Iterable[SequenceProgress]) -> None:
        """These were reported by themselves."""
        for one in progress:
            if one.finish_reason is not None:
                self._told.discard(one.request_id)
            elif one.token_ids:
                self._told.add(one.request_id)

    def begin(self, now: float, until: float, num_taken: int) -> EqualReports | None:
        """Reports to come of steps that begin now and later; None where a step is to be taken by itself.

        The last one may have to be told of by itself: if a request ends in it, if it begins at ``until`` or later, or
        for requests that have told of nothing yet. ``num_taken``: As of ``Progress``.
        """
        stretch = self.advance.plan(now, self._executor.step_seconds) if until > -math.inf else None
        if stretch is None:
            return None
        ids = [request.request_id for request in stretch.requests]
        are_new = not self._told.issuperset(ids)
        self._stretch = stretch
        self._set_times(now, until, 1 if are_new else stretch.most, stretch.seconds)
        count = len(self._starts)
        self._tells = are_new or count == stretch.until_end or self._starts[-1] >= until
        self._times = self._ends[: count - self._tells]
        self.number += 1
        return EqualReports(ids, self._times, self._stats_after(stretch), num_taken)

    def cut(self, now: float) -> bool:
        """Take back the steps that have not begun by now; whether there are any. One that begins now has not, but for
        the first."""
        begun = max(bisect_left(self._starts, now), 1)
        if begun == len(self._starts):
            return False
        del self._starts[begun:], self._ends[begun:], self._times[begun:]
        self._tells = False
        self.number += 1
        return True

    def end(self) -> list[SequenceProgress]:
        """The last step ends now. Returns what is to be told of it by itself."""
        stretch, self._stretch = self._stretch, None
        assert stretch is not None, "it was begun"
        self.num_steps += len(self._starts)
        progress = self.advance.carry_out(stretch, self._starts, tell=self._tells)
        self._executor.stepped(self._free[len(self._starts) - 1], len(self._starts), stretch.seconds)
        return progress

    @property
    def last_start(self) -> float:
        return self._starts[-1]

    def _stats_after(self, stretch: Stretch) -> Callable[[int], ReplicaStats]:
        stats, advance = stats_of(self._engine.scheduler, stretch.requests), self.advance

        def stats_after(count: int) -> ReplicaStats:
            free = stretch.num_free - advance.num_taken(stretch.computed, count)
            return msgspec.structs.replace(stats, num_free_blocks=free)

        return stats_after

    def _set_times(self, now: float, until: float, most: int, seconds: float) -> None:
        """When the steps begin, when the device has done them, and when their rounds end."""
        self._starts, self._free, self._ends = starts, frees, ends = [], [], []
        free = self._executor.free_at
        for _ in range(most):
            starts.append(now)
            free = max(free, now) + seconds
            frees.append(free)
            end = max(free + self._host, now + self._least)
            ends.append(end)
            if now >= until:
                break
            now = end
