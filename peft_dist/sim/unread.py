"""What replicas have said of plain decode steps, until somebody asks."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from peft_dist.core.messages import ReplicaStats
from peft_dist.orchestrator.equal_steps import EqualSteps

StatsAfter = Callable[[int], ReplicaStats]


class EqualReports(msgspec.Struct):
    """Reports that have nothing but one more token of each of the same sequences.

    Attributes:
        sequence_ids: All of these have been reported by themselves before.
        times: When each was sent; those to come may be taken back.
        stats_after: What the report with this index, from 1 on, says of the replica; None: another report of the same
            time does.
        num_taken: Requests that the replica has taken in, as each says.
    """

    sequence_ids: Sequence[str]
    times: list[float]
    stats_after: StatsAfter | None
    num_taken: int
    num_read: int = 0


class Unread:
    """Of one replica, in their order.

    Attributes:
        origin: Seconds that are 0 for who hears of tokens.
    """

    def __init__(self, lane: int, delay: float, steps: EqualSteps) -> None:
        """``delay``: Seconds that a report is under way. ``steps``: What they are taken in by."""
        self._lane = lane
        self._delay = delay
        self._steps = steps
        self.origin = 0.0
        self._reports: deque[EqualReports] = deque()
        # The last one of which something was read, and whether the replica's stats are older.
        self._last: EqualReports | None = None
        self._is_late = False

    def add(self, reports: EqualReports) -> None:
        """Some are under way."""
        self._reports.append(reports)

    def read(self, now: float, lane: int) -> None:
        """Take in what has arrived before whatever happens now in a lane, or with it in its own one.

        Afterwards the backlog is right, not the records.
        """
        reports, delay, origin = self._reports, self._delay, self.origin
        pick = bisect_right if self._lane <= lane else bisect_left
        while reports:
            one = reports[0]
            times, before = one.times, one.num_read
            if times and times[-1] + delay < now:
                after = len(times)
            else:
                after = pick(times, now, before, key=delay.__add__)
            if after > before:
                steps = self._steps
                steps.set_members(one.sequence_ids)
                arrived = [time + delay for time in times[before:after]]
                steps.take_in([time - origin for time in arrived], arrived[-1], one.num_taken)
                one.num_read, self._last, self._is_late = after, one, True
            if after < len(times):
                return
            reports.popleft()

    def part(self, sequence_ids: Sequence[str], now: float, lane: int) -> None:
        """As ``read``; the records of these sequences are right afterwards, for a report that has more of them."""
        self.read(now, lane)
        self._is_late = False
        if sequence_ids:
            self._steps.leave(sequence_ids)

    def look(self, now: float, lane: int) -> None:
        """As ``read``, with what the replica said of itself."""
        self.read(now, lane)
        self._steps.settle(self._stats(), whole=False)

    def settle(self, now: float, lane: int) -> None:
        """The same, with all records. Whoever owns a sequence may change after this."""
        self.read(now, lane)
        self._steps.settle(self._stats())

    def _stats(self) -> ReplicaStats | None:
        one, is_late = self._last, self._is_late
        self._is_late = False
        if not is_late or one is None or one.stats_after is None:
            return None
        return one.stats_after(one.num_read)
