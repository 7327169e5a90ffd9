"""Many equal decode steps at once, for whoever knows beforehand what each of them takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft_dist.core.batch import NO_ADAPTER
from peft_dist.core.cost_model import StepFeatures
from peft_dist.core.messages import SequenceProgress
from peft_dist.core.request import Request, RequestStatus
from peft_dist.engine.engine import Engine

# More are planned again: arrivals cut most plans short.
MAX_STEPS = 64


@dataclass(frozen=True, slots=True)
class Stretch:
    """Decode steps that are certain to be alike, if no request comes or goes: each draws one token for each request.

    Attributes:
        requests: In the order of their batch.
        order: The same as the policy chose them.
        features: Of each step.
        seconds: That each takes.
        most: How many there may be, 1 at least.
        until_end: How many it takes until a request ends, ``most`` at least.
        computed: Tokens of each request that are computed when the stretch begins.
        num_free: Free blocks then.
    """

    requests: list[Request]
    order: list[Request]
    features: StepFeatures
    seconds: float
    most: int
    until_end: int
    computed: list[int]
    num_free: int


class Advance:
    """Steps an engine over what does not change: same decisions, same state afterwards as by ``Engine.step``.

    Only where no batch stays in flight: with ``depth`` above 0 every plan is None. So it is with prefix caching, where
    each full block gets a name, and with a log of decisions, where each step has its line.
    """

    def __init__(self, engine: Engine, token: int) -> None:
        """``token``: What every draw is."""
        self._engine = engine
        self._scheduler = engine.scheduler
        self._token = token
        self._may = not engine.depth and not engine.scheduler.limits.enable_prefix_caching

    def plan(self, now: float, step_seconds: Callable[[StepFeatures], float]) -> Stretch | None:
        """The steps from now on, or None where the next one is to be taken by itself; ``Engine.step`` may follow.

        ``step_seconds``: What a step will take. No change of adapters may be under way.
        """
        engine, scheduler = self._engine, self._scheduler
        if not self._may or engine.on_decision is not None or not scheduler.queue or not scheduler.is_settled:
            return None
        state, choice = scheduler.propose(now)
        order = self._decoding([candidate.request_id for candidate in choice.candidates])
        if not order or choice.merged_adapter != engine.executor.merged_adapter():
            return None
        if not all(candidate.is_resident for candidate in state.candidates):
            return None
        if len(order) > scheduler.limits.max_num_batched_tokens:
            return None
        until_end = min(map(self._steps_left, order))
        most = min(until_end, MAX_STEPS)
        slots = scheduler.adapters
        requests = sorted(order, key=lambda r: slots.slot(r.content_hash) if r.adapter else NO_ADAPTER)
        features = self._features(requests, choice.merged_adapter)
        seconds = step_seconds(features)
        if most > 1:
            most = min(most, 1 + int(min(scheduler.policy.stable_steps(seconds), MAX_STEPS)))
        computed, num_free = [request.num_computed_tokens for request in requests], scheduler.blocks.num_free
        while most and self.num_taken(computed, most) > num_free:
            most //= 2
        if not most:
            return None
        return Stretch(requests, order, features, seconds, most, until_end, computed, num_free)

    def num_taken(self, computed: Sequence[int], count: int) -> int:
        """Blocks that so many steps take, from when so many tokens of each were computed."""
        size = self._scheduler.blocks.block_size
        return sum((before + count - 1) // size - (before - 1) // size for before in computed)

    def carry_out(self, stretch: Stretch, starts: Sequence[float], *, tell: bool) -> list[SequenceProgress]:
        """Take the steps of a plan that began at these times, the first when it was made; at most all of them.

        ``tell``: Return what the last of them drew, as ``Engine.step`` does. Where a request ends in it, this must be.
        """
        engine, scheduler, count = self._engine, self._scheduler, len(starts)
        self._grow(stretch, count)
        drawn = [self._token] * count
        for request in stretch.requests:
            request.output_token_ids += drawn
            request.num_computed_tokens += count
            request.last_scheduled = starts[-1]
        scheduler.repeated(stretch.order, starts)
        engine.repeated(stretch.requests, count)
        if not engine.cost.fixed:
            for _ in starts:
                engine.cost.observe_step(stretch.features, stretch.seconds)
        return [engine.told(request, self._token) for request in stretch.requests] if tell else []

    def _grow(self, stretch: Stretch, count: int) -> None:
        """Give out blocks in the order in which the steps would have taken them."""
        blocks, size = self._scheduler.blocks, self._scheduler.blocks.block_size
        due = [
            (step, place, request)
            for place, request in enumerate(stretch.order)
            for step in range(-request.num_computed_tokens % size, count, size)
        ]
        due.sort(key=lambda one: one[:2])
        for step, _, request in due:
            blocks.grow(request.request_id, request.num_computed_tokens + step + 1)

    def _decoding(self, request_ids: Sequence[str]) -> list[Request]:
        """The requests, if all of them decode, and end by their length alone; else none."""
        queue, eos = self._scheduler.queue, self._engine.eos_token_ids
        found = []
        for request_id in request_ids:
            request, params = queue[request_id], queue[request_id].params
            is_decode = request.num_known_tokens - request.num_computed_tokens == 1 and request.output_token_ids
            if not is_decode or request.status is not RequestStatus.RUNNING or request.num_in_flight:
                return []
            if params.stop_token_ids or params.prompt_logprobs is not None or (eos and not params.ignore_eos):
                return []
            found.append(request)
        return found

    def _steps_left(self, request: Request) -> int:
        """Steps until it has ended."""
        known = len(request.output_token_ids)
        room = self._scheduler.limits.max_model_len - len(request.prompt_token_ids) - known
        return min(request.max_output_tokens - known, room)

    @staticmethod
    def _features(requests: Sequence[Request], merged_adapter: str | None) -> StepFeatures:
        rows = [(r.adapter.content_hash, 1, r.adapter.num_rank_rows) if r.adapter else ("", 1, 0) for r in requests]
        merged_rank = max((rank for adapter, _, rank in rows if adapter == merged_adapter), default=0)
        return StepFeatures.of(rows, merged_adapter, merged_rank)
