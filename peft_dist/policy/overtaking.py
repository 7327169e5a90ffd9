"""For how long requests were overtaken: the bound on starvation."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

from peft_dist.policy.batching import Candidate

# An urgent request runs until half of its wait is paid back: with one step at a time it would get a token per bound.
RELIEF = 0.5


class _Step(NamedTuple):
    """Who ran in a step, and whom they overtook."""

    running: frozenset[str]
    overtaken: set[str]


_OVERTAKEN = attrgetter("overtaken")


class OvertakingTracker:
    """Seconds for which each request was overtaken.

    A request is overtaken in a step in which a younger one runs and it does not, although it could have, or could if
    the younger ones' adapters did not keep its own from the device. Its seconds grow while such steps last and shrink
    while it runs itself. It is urgent from when one more step would carry its seconds past the bound until they have
    shrunk to half of the bound. A policy that never lets an urgent request be overtaken keeps everybody's seconds below
    the bound, but for the loading of adapters.
    """

    def __init__(self, bound: float, steps_in_flight: int = 0) -> None:
        """``steps_in_flight``: Steps submitted after the one that takes the time between two choices."""
        self.bound = bound
        self.longest_ever = 0.0
        self._seconds: dict[str, float] = {}
        self._urgent: set[str] = set()
        # Those that have not begun, behind the one that the time now passes for.
        self._steps = deque((_Step(frozenset(), set()) for _ in range(steps_in_flight + 1)), steps_in_flight + 1)
        self._since = 0.0

    def seconds(self, request_id: str) -> float:
        return self._seconds.get(request_id, 0.0)

    @property
    def longest(self) -> float:
        """The largest number of seconds of all unfinished requests."""
        return max(self._seconds.values(), default=0.0)

    def advance(self, now: float) -> None:
        """Count the seconds since the last call for those who ran, or were overtaken, in the step that took them.

        With a step in flight that is not the one submitted last, which the device has not begun.
        """
        elapsed = max(0.0, now - self._since)
        self._since = now
        if not elapsed:
            return
        running, overtaken = self._steps[0]
        if not overtaken and not self._seconds:
            return
        for request_id in overtaken:
            self._seconds[request_id] = self.seconds(request_id) + elapsed
            self.longest_ever = max(self.longest_ever, self._seconds[request_id])
        for request_id in running & self._seconds.keys():
            self._seconds[request_id] -= elapsed
            if self._seconds[request_id] <= self.bound * RELIEF:
                self._urgent.discard(request_id)
            if self._seconds[request_id] <= 0:
                del self._seconds[request_id]

    def urgent(self, runnable: Sequence[Candidate], next_step: float) -> list[Candidate]:
        """Those who must not be overtaken in a step of ``next_step`` seconds (switches included), oldest first."""
        limit = self.bound - next_step
        if not self._urgent and not self._seconds and limit >= 0:
            return []
        return [
            candidate
            for candidate in runnable
            if candidate.request_id in self._urgent or self.seconds(candidate.request_id) > limit
        ]

    def ran(self, entitled: Sequence[Candidate], urgent: Collection[Candidate], scheduled: Collection[str]) -> None:
        """The step in which ``scheduled`` ran was submitted, with ``urgent`` known to be so.

        Args:
            entitled: Those who can be overtaken, and those who ran, oldest first.
        """
        if urgent:
            self._urgent.update([candidate.request_id for candidate in urgent])
        self._steps.append(_Step(frozenset(scheduled), self._overtaken(entitled, scheduled)))

    @staticmethod
    def _overtaken(entitled: Sequence[Candidate], scheduled: Collection[str]) -> set[str]:
        if not entitled:
            return set()
        ids = [candidate.request_id for candidate in entitled]
        if all(map(scheduled.__contains__, ids)):
            return set()
        while ids and ids[-1] not in scheduled:
            ids.pop()
        return {request_id for request_id in ids if request_id not in scheduled}

    def stable_steps(
        self, entitled: Sequence[Candidate], scheduled: Collection[str], next_step: float, seconds: float
    ) -> float:
        """After how many steps that take ``seconds`` each somebody may become urgent, where nobody is now.

        ``next_step``: As of ``urgent``; ``entitled``, ``scheduled``: as of ``ran``.
        """
        if self._urgent:
            return 0.0
        if not entitled and not self._is_counting:
            return math.inf if self.bound - next_step > 0 else 0.0
        overtaken = self._overtaken(entitled, scheduled)
        for step in self._steps:
            overtaken = overtaken | step.overtaken
        most = max(self._seconds.values(), default=0.0)
        left = self.bound - next_step - most
        if not overtaken:
            return math.inf if left > 0 else 0.0
        return max(left / seconds - len(self._steps) - 1, 0.0)

    def again(self, starts: Sequence[float]) -> None:
        """The step that was submitted last was submitted again at each of these times, with nobody urgent, and
        ``advance`` came before each."""
        last = self._steps[-1]
        if self._is_counting:
            for start in starts:
                self.advance(start)
                self._steps.append(_Step(last.running, set(last.overtaken)))
            return
        self._since = starts[-1]
        for _ in range(min(len(starts), len(self._steps) - 1)):
            self._steps.append(last)  # Nobody changes a set that nobody is in.

    @property
    def _is_counting(self) -> bool:
        """Whether somebody was overtaken, for any time or by a step that may still last."""
        return bool(self._seconds) or any(map(_OVERTAKEN, self._steps))

    def forget(self, request_ids: Iterable[str]) -> None:
        if not (self._urgent or self._is_counting):
            return
        for request_id in request_ids:
            self._seconds.pop(request_id, None)
            self._urgent.discard(request_id)
            for step in self._steps:
                step.overtaken.discard(request_id)
