"""Plain steps of one simulated replica, under way as one event."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate, repeat

from peft_dist.core.cost_model import StepFeatures
from peft_dist.core.messages import ReplicaStats, SequenceProgress
from peft_dist.core.request import RequestStatus
from peft_dist.engine.advance import Advance, Stretch
from peft_dist.engine.engine import Engine
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
        # Sequences that were reported by themselves, and have not ended.
        self._told: set[str] = set()
        # Of the last step that was taken by itself, who had one more token.
        self._plain: list[str] = []
        self._stretch: Stretch | None = None
        self._new: set[str] = set()
        self._starts: list[float] = []
        self._ends: list[float] = []
        # What each step takes of the device's time.
        self._seconds: list[float] = []
        # Tokens that all its requests have in the KV cache when a stretch begins.
        self._num_cached = 0
        # Of the last stretch: what each of its steps takes, where they do not grow.
        self._stretch_seconds: tuple[StepFeatures | None, float] = None, 0.0
        self._reports = EqualReports((), [], None, 0)
        self._tells = False
        self.number = 0
        self.num_steps = 0

    @property
    def is_on(self) -> bool:
        return self._stretch is not None

    @property
    def ends_at(self) -> float:
        return self._ends[-1]

    @property
    def starts(self) -> list[float]:
        """When the steps of the last one began."""
        return self._starts

    def told(self, progress: Iterable[SequenceProgress]) -> None:
        """These were reported by themselves."""
        for one in progress:
            if one.finish_reason is not None:
                self._told.discard(one.request_id)
            elif one.token_ids:
                self._told.add(one.request_id)

    def parted(self, progress: Iterable[SequenceProgress]) -> tuple[list[str], list[SequenceProgress]]:
        """Who has nothing but one more token, and was reported before; and what is to be told of all others."""
        plain, rest, told = [], [], self._told
        for one in progress:
            # As ``_is_plain``, written out.
            is_one = len(one.token_ids) == 1 and one.logprobs is None and one.prompt_logprobs is None
            if is_one and one.finish_reason is None and one.request_id in told:
                plain.append(one.request_id)
            else:
                rest.append(one)
        if plain == self._plain:
            # The same list tells its readers that nobody came or left.
            return self._plain, rest
        self._plain = plain
        return plain, rest

    def has_news(self, progress: Iterable[SequenceProgress]) -> bool:
        """Whether somebody has more than one more token."""
        return not all(map(self._is_plain, progress))

    def _is_plain(self, one: SequenceProgress) -> bool:
        if one.finish_reason is not None or one.request_id not in self._told:
            return False
        return len(one.token_ids) == 1 and one.logprobs is None and one.prompt_logprobs is None

    def begin(self, now: float, until: float, num_taken: int, told_version: int) -> EqualReports | None:
        """Reports to come of steps that begin now and later; None where a step is to be taken by itself.

        The last one may have to be told of by itself: if a request begins or ends in it, if it begins at ``until`` or
        later, if adapters have moved since ``told_version`` of them, or for requests that have told of nothing yet.
        ``num_taken``: As of ``Progress``.
        """
        stretch = self.advance.plan(now, self._step_seconds) if until > -math.inf else None
        if stretch is None:
            return None
        self._stretch = stretch
        ids = [request.request_id for request in stretch.order]
        self._new.clear()
        if stretch.begin:
            begin = {request.request_id for request in stretch.begin}
            ids = [request_id for request_id in ids if request_id not in begin]
        if not self._told.issuperset(ids):
            self._new.update(request_id for request_id in ids if request_id not in self._told)
            ids = [request_id for request_id in ids if request_id in self._told]
        is_news = bool(stretch.begin or self._new or stretch.failed or self._engine.residency_version != told_version)
        self._set_times(now, until, 1 if is_news else stretch.most)
        count = len(self._starts)
        self._tells = is_news or count == stretch.until_end or self._starts[-1] >= until
        self._reports = EqualReports(ids, self._ends[: count - self._tells], self._stats_after(stretch), num_taken)
        self.number += 1
        return self._reports

    def cut(self, now: float) -> bool:
        """Take back the steps that have not begun by now; whether there are any. One that begins now has not, but for
        the first."""
        begun = max(bisect_left(self._starts, now), 1)
        if begun == len(self._starts):
            return False
        del self._starts[begun:], self._ends[begun:], self._seconds[begun:], self._reports.times[begun:]
        self._tells = False
        self.number += 1
        return True

    def end(self) -> tuple[list[SequenceProgress], EqualReports] | None:
        """The last step ends now. Returns what is to be told of it by itself, and the report of all others; None where
        nothing is. ``told`` is to hear of the former, once it was told: until then it is news."""
        stretch, self._stretch = self._stretch, None
        assert stretch is not None, "it was begun"
        starts, reports = self._starts, self._reports
        self.num_steps += len(starts)
        progress = self.advance.carry_out(stretch, starts, self._seconds, tell=self._tells, new=self._new)
        self._executor.stepped(self._free_at(), self._seconds)
        if not self._tells:
            return None
        ids = reports.sequence_ids
        if progress:
            told = {one.request_id for one in progress}
            ids = [request_id for request_id in ids if request_id not in told]
        return progress, EqualReports(ids, [self._ends[-1]], None, reports.num_taken)

    def _stats_after(self, stretch: Stretch) -> Callable[[int], ReplicaStats]:
        scheduler, size = self._engine.scheduler, self._engine.scheduler.blocks.block_size
        running, computed = len(stretch.order), [request.num_computed_tokens for request in stretch.order]
        resident, held, free = scheduler.adapters.resident, len(scheduler.queue), stretch.num_free
        swapped = 0
        if scheduler.blocks.num_swapped:
            swapped = sum(request.status is RequestStatus.SWAPPED for request in scheduler.queue.values())
        counts = scheduler.num_preemptions, scheduler.prefix_queries, scheduler.prefix_hits

        def stats_after(count: int) -> ReplicaStats:
            taken = sum((before + count - 1) // size - (before - 1) // size for before in computed)
            return ReplicaStats(
                num_running=running,
                num_waiting=held - swapped - running,
                num_swapped=swapped,
                num_free_blocks=free - taken,
                num_blocks=scheduler.blocks.num_blocks,
                num_preemptions=counts[0],
                prefix_cache_queries=counts[1],
                prefix_cache_hits=counts[2],
                resident_adapters=resident,
            )

        return stats_after

    def _step_seconds(self, stretch: Stretch, number: int) -> float:
        """What the step after so many others of a stretch takes."""
        executor, features = self._executor, stretch.features
        if not executor.counts_context:
            if number and self._stretch_seconds[0] is features:
                return self._stretch_seconds[1]
            self._stretch_seconds = features, executor.step_seconds(features)
            return self._stretch_seconds[1]
        if not number:
            # Of those that begin, nothing is computed: there is one step then.
            self._num_cached = sum(request.num_computed_tokens for request in stretch.order)
        return executor.step_seconds(features, self._num_cached + number * features.decode_sequences)

    def _set_times(self, now: float, until: float, most: int) -> None:
        """When the steps begin, and when their rounds end."""
        assert self._stretch is not None, "it was begun"
        first = self._stretch.seconds
        end = max(max(self._executor.free_at, now) + first + self._host, now + self._least)
        self._starts, self._ends, self._seconds = starts, ends, seconds = [now], [end], [first]
        if most == 1 or now >= until:
            return
        grows = self._executor.counts_context
        if grows or self._host or first < 2 * self._least:
            while len(starts) < most and starts[-1] < until:
                starts.append(end)
                took = self._step_seconds(self._stretch, len(seconds)) if grows else first
                seconds.append(took)
                end = max(end + took + self._host, end + self._least)
                ends.append(end)
            return
        self._ends = ends = list(accumulate(repeat(first, most - 1), initial=end))
        starts += ends[:-1]
        count = bisect_left(starts, until) + 1
        del starts[count:], ends[count:]
        seconds += repeat(first, len(starts) - 1)

    def _free_at(self) -> float:
        """When the device has done the last step."""
        began = self._starts[-1]
        free_at = max(self._executor.free_at, began) if len(self._starts) == 1 else began
        return free_at + self._seconds[-1]
