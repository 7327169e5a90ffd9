"""Decode steps and whole prompts by a short way, for whoever knows beforehand what each step takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import msgspec

from peft_dist.core.batch import NO_ADAPTER
from peft_dist.core.cost_model import StepFeatures
from peft_dist.core.messages import SequenceProgress
from peft_dist.core.request import Request, RequestStatus
from peft_dist.engine.engine import Engine
from peft_dist.engine.stopping import find_plain_end
from peft_dist.policy.batching import Candidate, Choice

# More are planned again: arrivals cut most plans short.
MAX_STEPS = 64
_NOBODY: frozenset[str] = frozenset()


class Stretch(msgspec.Struct):
    """Steps that are certain to be alike, if no request comes or goes: each draws one token for each request.

    Attributes:
        order: All requests, as the policy chose them.
        begin: Of these, the ones whose whole prompt is computed; there is one step then.
        features: Of each step.
        seconds: That the first one takes.
        most: How many there may be, 1 at least.
        until_end: How many it takes until a request ends, ``most`` at least.
        num_free: Free blocks when the stretch begins.
        failed: Ends of requests whose adapter could not be loaded, to be told with the only step.
    """

    order: list[Request]
    begin: list[Request]
    features: StepFeatures
    seconds: float
    most: int
    until_end: int
    num_free: int
    failed: list[SequenceProgress] = []


class Advance:
    """Steps an engine over what does not change: same decisions, same state afterwards as by ``Engine.step``.

    Which of the free blocks a request gets may differ; nothing depends on it. Only where no batch stays in flight:
    with ``depth`` above 0 every plan is None. So it is with prefix caching, where each full block gets a name, and with
    a log of decisions, where each step has its line.
    """

    def __init__(self, engine: Engine, token: int) -> None:
        """``token``: What every draw is."""
        self._engine = engine
        self._scheduler = engine.scheduler
        self._token = token
        # The choice of the last stretch of decodes, its requests, how many steps they have left, and the number of the
        # engine's step at which all is so: candidates stay the same over a step that it takes by itself, too.
        self._last: tuple[Sequence[Candidate], list[Request], int, int] | None = None
        self._may = not engine.depth and not engine.scheduler.limits.enable_prefix_caching

    def plan(self, now: float, step_seconds: Callable[[Stretch, int], float]) -> Stretch | None:
        """The steps from now on, or None where the next one is to be taken by itself; ``Engine.step`` may follow.

        What adapters' loads that have ended change is changed now. ``step_seconds``: What a step after so many others
        of its stretch will take, never less than what those before it do.
        """
        engine, scheduler = self._engine, self._scheduler
        if not self._may or engine.on_decision is not None or not scheduler.queue or not scheduler.is_settled:
            return None
        engine.take_loaded()
        state, choice = scheduler.propose(now)
        engine.apply_adapter_changes()
        if not choice.candidates or choice.merged_adapter != state.merged_adapter:
            return None
        stretch = self._drafted(choice)
        if stretch is None:
            return None
        stretch.seconds = step_seconds(stretch, 0)
        if stretch.most > 1 and (scheduler.adapters.is_busy or not scheduler.are_adapters_here):
            stretch.most = 1
        if stretch.most > 1:
            # By the longest of them nobody's time comes later than it does.
            stable = scheduler.policy.stable_steps(step_seconds(stretch, stretch.most - 1))
            stretch.most = min(stretch.most, 1 + int(min(stable, MAX_STEPS)))
        while stretch.most and not self._fits(stretch, stretch.most):
            stretch.most //= 2
        if not stretch.most:
            return None
        stretch.failed = engine.take_failed()
        if stretch.failed:
            stretch.most = 1
        return stretch

    def num_taken(self, stretch: Stretch, count: int) -> int:
        """Blocks that so many of its steps take; right until it is carried out."""
        size = self._scheduler.blocks.block_size
        taken = 0
        for request in stretch.order:
            # Of one that begins, nothing is computed.
            before = request.num_computed_tokens
            after = before + count if before else len(request.prompt_token_ids)
            taken += (after - 1) // size - (before - 1) // size
        return taken

    def requests(self, stretch: Stretch) -> list[Request]:
        """All requests, in the order of their batch."""
        return sorted(stretch.order, key=self._slot)

    def carry_out(
        self,
        stretch: Stretch,
        starts: Sequence[float],
        seconds: Sequence[float],
        *,
        tell: bool,
        new: Collection[str] = _NOBODY,
    ) -> list[SequenceProgress]:
        """Take the steps of a plan that began at these times, the first when it was made; at most all of them.

        Args:
            seconds: What each took.
            tell: Return what the last of them drew, as ``Engine.step`` does, for those that begin or end with it and
                for the requests ``new``. Where there are any, it must be told.
        """
        engine, scheduler, count = self._engine, self._scheduler, len(starts)
        blocks, size, last = scheduler.blocks, scheduler.blocks.block_size, starts[-1]
        for request in stretch.begin:
            self._begin(request, last)
        drawn = [self._token] * count
        for request in stretch.order:
            request.output_token_ids += drawn
            request.last_scheduled = last
            before = request.num_computed_tokens
            if before:
                after = request.num_computed_tokens = before + count
                if (after - 1) // size != (before - 1) // size:
                    blocks.grow(request.request_id, after)
            else:
                request.num_computed_tokens = len(request.prompt_token_ids)
        scheduler.repeated(stretch.order, starts, stretch.begin)
        engine.repeated(stretch.order, count)
        if self._last is not None:
            self._last = self._last[0], stretch.order, self._last[2] - count, engine.num_steps
        if not engine.cost.fixed:
            for took in seconds:
                engine.cost.observe_step(stretch.features, took)
        return self._told(stretch, count, new) if tell else []

    def _told(self, stretch: Stretch, count: int, new: Collection[str]) -> list[SequenceProgress]:
        ids = {request.request_id for request in stretch.begin} | set(new)
        ends = count == stretch.until_end
        special = [
            request
            for request in stretch.order
            if request.request_id in ids or (ends and len(request.output_token_ids) == request.plain_end)
        ]
        if len(special) > 1:
            special.sort(key=self._slot)
        return stretch.failed + [self._engine.told(request, self._token) for request in special]

    def _begin(self, request: Request, now: float) -> None:
        """What ``Scheduler.schedule`` does for a prompt that it takes whole, where there are blocks for it."""
        there_were = self._scheduler.blocks.allocate(request.request_id, [], len(request.prompt_token_ids))
        assert there_were, "the plan has counted them"
        request.status = RequestStatus.RUNNING
        request.first_scheduled = now
        self._scheduler.prefix_queries += len(request.prompt_token_ids)

    def _drafted(self, choice: Choice) -> Stretch | None:
        """The stretch of a choice, as far as its requests are concerned: all decode, or begin with their whole prompt,
        and end by their length alone; else None."""
        queue, last = self._scheduler.queue, self._last
        order: list[Request] = []
        begin: list[Request] = []
        until_end = 1 << 40
        ends = self._engine.eos_token_ids, self._scheduler.limits.max_model_len
        if last is not None and last[0] is choice.candidates and last[3] == self._engine.num_steps:
            _, order, until_end, _ = last
        else:
            for candidate in choice.candidates:
                request = queue[candidate.request_id]
                num_drawn = len(request.output_token_ids)
                left = (request.plain_end or find_plain_end(request, *ends)) - num_drawn
                if left < 1 or request.num_in_flight:
                    return None
                if num_drawn:
                    if candidate.num_new_tokens != 1 or request.status is not RequestStatus.RUNNING:
                        return None
                elif request.status is RequestStatus.WAITING and not request.num_preemptions:
                    begin.append(request)
                else:
                    return None
                order.append(request)
                if left < until_end:
                    until_end = left
        num_tokens = len(order)
        for request in begin:
            num_tokens += len(request.prompt_token_ids) - 1
        if num_tokens > self._scheduler.limits.max_num_batched_tokens:
            return None
        features = choice.features
        if features is None or choice.merged_adapter is not None:
            features = _features(choice.candidates, choice.merged_adapter)
        most = 1 if begin else min(until_end, MAX_STEPS)
        self._last = None if begin else (choice.candidates, order, until_end, self._engine.num_steps)
        return Stretch(order, begin, features, 0.0, most, until_end, self._scheduler.blocks.num_free)

    def _fits(self, stretch: Stretch, count: int) -> bool:
        """Whether there are blocks for so many steps."""
        size = self._scheduler.blocks.block_size
        if not stretch.begin and stretch.num_free >= len(stretch.order) * (count // size + 1):
            return True
        return self.num_taken(stretch, count) <= stretch.num_free

    def _slot(self, request: Request) -> int:
        return NO_ADAPTER if request.adapter is None else self._scheduler.adapters.slot(request.adapter.content_hash)


def _features(candidates: Sequence[Candidate], merged_adapter: str | None) -> StepFeatures:
    """Of a step that computes all tokens of these."""
    rows = [(one.adapter, one.num_new_tokens, one.rank) for one in candidates]
    merged_rank = max((rank for adapter, _, rank in rows if adapter == merged_adapter), default=0)
    return StepFeatures.of(rows, merged_adapter, merged_rank)
