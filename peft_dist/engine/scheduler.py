"""Continuous batching: which tokens of which requests run in the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from peft_dist.core.batch import NO_ADAPTER, PLACEHOLDER, Batch, ScheduledSequence, SequenceStart
from peft_dist.core.block_hash import extend_block_hashes
from peft_dist.core.block_manager import BlockManager
from peft_dist.core.config import Preemption
from peft_dist.core.request import Request, RequestStatus
from peft_dist.engine.adapter_manager import AdapterManager


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    preemption: Preemption = "auto"


class Scheduler:
    """First come, first served, with prefill chunks and decodes in one batch.

    Requests that run keep running; when KV blocks run out the youngest is preempted, its blocks swapped to
    the host or dropped and computed again later. Tokens count as computed from the moment their batch is
    scheduled, since batches run in order; a draw whose value is not known yet is a placeholder.
    """

    def __init__(self, limits: SchedulerLimits, blocks: BlockManager, adapters: AdapterManager) -> None:
        self.limits = limits
        self.blocks = blocks
        self.adapters = adapters
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.swapped: deque[Request] = deque()
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._step = 0
        self._swap_outs: list[tuple[int, int]] = []
        self._swap_ins: list[tuple[int, int]] = []
        self._starts: list[SequenceStart] = []

    @property
    def has_requests(self) -> bool:
        return bool(self.waiting or self.running or self.swapped)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> Batch | None:
        """The next batch, or None when nothing can run now."""
        budget = self.limits.max_num_batched_tokens
        scheduled: list[ScheduledSequence] = []
        preempted = False
        index = 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            num_new = min(self._num_runnable(request), budget)
            if num_new:
                if not self._make_room(request, num_new):
                    preempted = True
                    break
                scheduled.append(self._advance(request, num_new))
                budget -= num_new
            index += 1
        if not preempted and not self._swap_outs:
            scheduled += self._admit(budget)
        return self._batch(scheduled)

    def finish(self, request: Request, reason: str, stop_reason: int | None = None) -> None:
        """End a request, wherever it stands, and give back all that it holds."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._release_slot(request)
        elif request.status is RequestStatus.SWAPPED:
            self.swapped.remove(request)
        elif request.status is RequestStatus.WAITING:
            self.waiting.remove(request)
        self.blocks.free(request.request_id)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason

    def publish(self, requests: Iterable[Request]) -> None:
        """Offer the full blocks of running requests, as far as their tokens are known, to later prompts."""
        if not self.limits.enable_prefix_caching:
            return
        for request in requests:
            if request.status is RequestStatus.RUNNING:
                self._publish(request)

    def _publish(self, request: Request) -> None:
        extend_block_hashes(request, self.blocks.block_size)
        full = min(request.num_computed_tokens, request.num_known_tokens) // self.blocks.block_size
        for index in range(request.num_published_blocks, full):
            self.blocks.publish(request.request_id, index, request.block_hashes[index])
        request.num_published_blocks = full

    def _num_runnable(self, request: Request) -> int:
        """Tokens of a running request whose KV is still to be computed and worth it."""
        at_length = request.num_tokens >= self.limits.max_model_len
        if request.num_in_flight and (at_length or request.num_output_tokens >= request.max_output_tokens):
            return 0
        return request.num_tokens - request.num_computed_tokens

    def _make_room(self, request: Request, num_new: int) -> bool:
        """Blocks for ``num_new`` tokens, taken from the youngest if need be; False when it was ``request``."""
        while not self.blocks.grow(request.request_id, request.num_computed_tokens + num_new):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release_slot(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        copies = self.blocks.swap_out(request.request_id) if self.limits.preemption != "recompute" else None
        if copies is not None:
            self._swap_outs += copies
            request.status = RequestStatus.SWAPPED
            self.swapped.appendleft(request)
            return
        self.blocks.free(request.request_id)
        request.num_computed_tokens = 0
        request.status = RequestStatus.WAITING
        self.waiting.appendleft(request)

    def _admit(self, budget: int) -> list[ScheduledSequence]:
        """Bring back swapped requests, then start waiting ones, oldest first and without overtaking."""
        scheduled = []
        while budget > 0 and len(self.running) < self.limits.max_num_seqs:
            queue = self.swapped or self.waiting
            if not queue or queue[0].num_in_flight:
                break
            request = queue[0]
            if request.adapter is not None and self.adapters.acquire(request.adapter) is None:
                break
            num_new = self._resume(request, budget) if queue is self.swapped else self._start(request, budget)
            if not num_new:
                self._release_slot(request)
                break
            queue.popleft()
            request.status = RequestStatus.RUNNING
            self.running.append(request)
            scheduled.append(self._advance(request, num_new))
            budget -= num_new
        return scheduled

    def _resume(self, request: Request, budget: int) -> int:
        num_new = min(request.num_tokens - request.num_computed_tokens, budget)
        copies = self.blocks.swap_in(request.request_id, request.num_computed_tokens + num_new)
        if copies is None:
            return 0
        self._swap_ins += copies
        request.num_published_blocks = 0
        return num_new

    def _start(self, request: Request, budget: int) -> int:
        prefix = self._cached_prefix(request)
        num_cached = len(prefix) * self.blocks.block_size
        num_new = min(request.num_tokens - num_cached, budget)
        if not self.blocks.allocate(request.request_id, prefix, num_cached + num_new):
            return 0
        request.num_computed_tokens = num_cached
        request.num_published_blocks = len(prefix)
        if not request.num_preemptions:
            # The first start of all: a preempted request is known to the executor already.
            request.num_cached_tokens = num_cached
            self.prefix_queries += request.num_tokens
            self.prefix_hits += num_cached
            self._starts.append(_start_of(request))
        return num_new

    def _cached_prefix(self, request: Request) -> list[int]:
        # Prompt scores need the logits of every prompt position, so nothing can be skipped.
        if not self.limits.enable_prefix_caching or request.wants_prompt_logprobs:
            return []
        extend_block_hashes(request, self.blocks.block_size)
        usable = (request.num_tokens - 1) // self.blocks.block_size
        return self.blocks.find_prefix(request.block_hashes[:usable])

    def _release_slot(self, request: Request) -> None:
        if request.adapter is not None:
            self.adapters.release(request.adapter)

    def _advance(self, request: Request, num_new: int) -> ScheduledSequence:
        start = request.num_computed_tokens
        stop = start + num_new
        tokens = request.tokens(start, min(stop, request.num_known_tokens))
        wants_scores = request.wants_prompt_logprobs and start < len(request.prompt_token_ids) - 1
        samples = stop == request.num_tokens and request.num_output_tokens < request.max_output_tokens
        sequence = ScheduledSequence(
            request_id=request.request_id,
            token_ids=tokens + [PLACEHOLDER] * (num_new - len(tokens)),
            start=start,
            block_table=list(self.blocks.table(request.request_id)),
            adapter_slot=self.adapters.slot(request.adapter) if request.adapter else NO_ADAPTER,
            samples=samples,
            draw=request.num_output_tokens,
            wants_prompt_logprobs=wants_scores,
        )
        request.num_computed_tokens = stop
        request.num_in_flight += samples
        if self.limits.enable_prefix_caching:
            # Already now: every layer writes all keys and values of a batch before it reads any, so that
            # twins in the same batch share blocks.
            self._publish(request)
        return sequence

    def _batch(self, scheduled: list[ScheduledSequence]) -> Batch | None:
        if not scheduled and not self._swap_outs:
            return None
        # Rows of one adapter stand together, so that its weights are read once per layer.
        scheduled.sort(key=lambda sequence: sequence.adapter_slot)
        batch = Batch(self._step, scheduled, self._starts, self._swap_outs, self._swap_ins)
        self._step += 1
        self._starts, self._swap_outs, self._swap_ins = [], [], []
        return batch


def _start_of(request: Request) -> SequenceStart:
    return SequenceStart(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=list(request.output_token_ids),
        params=request.params,
        seed=request.seed,
        sequence_index=request.sequence_index,
    )
