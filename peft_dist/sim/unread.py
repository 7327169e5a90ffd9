"""What replicas have said of equal decode steps, until somebody asks."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft_dist.core.messages import ReplicaStats
from peft_dist.orchestrator.equal_steps import EqualSteps

StatsAfter = Callable[[int], ReplicaStats]


@dataclass(slots=True)
class EqualReports:
    """
    Attributes:
        sequence_ids: Of which each report has one token, in its order.
        times: When each was sent; those to come may be taken back, and more may be added.
        stats_after: What the report with this index, from 1 on, says of the replica.
        num_taken: Requests that the replica has taken in, as each says.
    """

    sequence_ids: list[str]
    times: list[float]
    stats_after: StatsAfter
    num_taken: int
    num_read: int = 0
    num_told: int = 0
    steps: EqualSteps | None = None


class Unread:
    """Of one replica, in their order."""

    def __init__(
        self,
        lane: int,
        delay: float,
        open_steps: Callable[[list[str], int], EqualSteps],
        drew: Callable[[Sequence[str], Sequence[float]], None],
    ) -> None:
        """``delay``: Seconds that a report is under way. ``drew``: Hears of requests and of the times at which it
        was reported that each of them drew a token."""
        self._lane = lane
        self._delay = delay
        self._open = open_steps
        self._drew = drew
        self._reports: deque[EqualReports] = deque()
        self.next_time = math.inf
        """When the next one arrives."""

    def add(self, reports: EqualReports) -> None:
        self._reports.append(reports)
        if self.next_time == math.inf and reports.times:
            self.next_time = reports.times[0] + self._delay

    def read(self, now: float, lane: int) -> None:
        """Take in what has arrived before whatever happens now in a lane. Records are not right before ``settle``."""
        pick = bisect_right if self._lane < lane else bisect_left
        reports = self._reports
        while reports:
            one = reports[0]
            times, before = one.times, one.num_read
            read = pick(times, now, before, key=self._arrival)
            if read > before:
                if one.steps is None:
                    one.steps = self._open(one.sequence_ids, one.num_taken)
                one.steps.take_in(read - before)
                one.num_read = read
            if read < len(times):
                self.next_time = times[read] + self._delay
                return
            self._settle(one)
            reports.popleft()
        self.next_time = math.inf

    def settle(self, now: float, lane: int) -> None:
        """The same, with all records. Whoever owns a sequence may change after this."""
        if not self._reports:
            return
        self.read(now, lane)
        if self._reports:
            self._settle(self._reports[0])
            self._reports[0].steps = None

    def look(self, now: float, lane: int) -> None:
        """As ``read``, with what the replica said of itself."""
        self.read(now, lane)
        if self._reports and (one := self._reports[0]).steps is not None:
            one.steps.settle(one.stats_after(one.num_read), one.times[one.num_read - 1] + self._delay)

    def _arrival(self, time: float) -> float:
        return time + self._delay

    def _settle(self, one: EqualReports) -> None:
        if one.steps is None:
            return
        last = one.times[one.num_read - 1] + self._delay
        one.steps.settle(one.stats_after(one.num_read), last)
        if one.num_read > one.num_told:
            told = [time + self._delay for time in one.times[one.num_told : one.num_read]]
            self._drew(one.steps.request_ids, told)
        one.num_told = one.num_read
