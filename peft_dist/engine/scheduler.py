"""Continuous batching: which tokens of which requests run in the next step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from operator import attrgetter

from peft_dist.core.batch import NO_ADAPTER, Batch, ScheduledSequence, SequenceStart
from peft_dist.core.block_hash import extend_block_hashes
from peft_dist.core.block_manager import BlockManager
from peft_dist.core.cost_model import StepFeatures
from peft_dist.core.request import Request, RequestStatus
from peft_dist.engine.adapter_manager import AdapterManager
from peft_dist.engine.adapter_wants import want_adapters
from peft_dist.engine.candidates import Candidates, num_runnable
from peft_dist.engine.draft import Draft
from peft_dist.engine.limits import SchedulerLimits
from peft_dist.engine.sequences import decode_of, part_of, start_of
from peft_dist.policy.batching import BatchingPolicy, Choice, QueueState

_SLOT = attrgetter("adapter_slot")


class Scheduler:
    """Carries out what the batching policy chooses: prefill chunks and decodes in one batch, merged or not.

    All unfinished requests stand in one queue by age. Those that have KV blocks keep them while the policy passes them
    over; when blocks run out, those that were not chosen lose theirs first, then the youngest chosen ones: swapped to
    the host, or dropped and computed again later. Tokens count as computed from the moment their batch is scheduled,
    since batches run in order; a draw whose value is not known yet is a placeholder.

    Attributes:
        mergeable: Whether the adapter with this content hash can be merged into the base; the engine tells.
        can_host: Whether others may join its merged batches.
        features: Of the last batch, where it is known without a look at it.
        held: Requests that no step takes and nobody takes blocks from: they are about to go to another replica.
        merged_adapter, holds_merged: What the weights hold, and whether an adapter comes back into them at no cost.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        blocks: BlockManager,
        adapters: AdapterManager,
        policy: BatchingPolicy,
    ) -> None:
        self.limits = limits
        self.blocks = blocks
        self.adapters = adapters
        self.policy = policy
        self.mergeable: Callable[[str], bool] = lambda _: False
        self.can_host: Callable[[str], bool] = lambda _: False
        self.merged_adapter: Callable[[], str | None] = lambda: None
        self.holds_merged: Callable[[str], bool] = lambda _: False
        self.queue: dict[str, Request] = {}
        self.held: dict[str, Request] = {}
        self.choice = Choice(None, [], "idle")
        self.features: StepFeatures | None = None
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._step = 0
        self._state: QueueState | None = None
        self._candidates = Candidates(limits)
        self._swap_outs: list[tuple[int, int]] = []
        self._swap_ins: list[tuple[int, int]] = []
        self._starts: list[SequenceStart] = []

    @property
    def is_settled(self) -> bool:
        """Whether nothing but the next step's tokens is to be told with it."""
        return not (self._starts or self._swap_outs or self._swap_ins)

    @property
    def are_adapters_here(self) -> bool:
        """Whether all that queued requests use are on the device, as the last proposal has seen them."""
        return self._candidates.are_here(self.adapters)

    def counts(self) -> Counter[RequestStatus]:
        """Unfinished requests by status."""
        return Counter(request.status for request in self.queue.values())

    @property
    def next_step(self) -> int:
        """The number of the next batch."""
        return self._step

    def add(self, request: Request) -> None:
        """Queue a request by its arrival; one that comes from another replica may be older than what is here.

        Such a one may be running already, with blocks that hold its KV.
        """
        if request.status is RequestStatus.RUNNING:
            self._starts.append(start_of(request))
        self._enqueue(request)

    def hold(self, request: Request) -> None:
        """Let no further step take a queued request; it keeps all that it has."""
        self._forget(request)
        self.held[request.request_id] = self.queue.pop(request.request_id)
        self.policy.forget([request.request_id])

    def go_on(self, request: Request) -> None:
        """End what ``hold`` began."""
        self._enqueue(self.held.pop(request.request_id))

    def _forget(self, request: Request) -> None:
        self._state = None
        self._candidates.forget(request.request_id)

    def _enqueue(self, request: Request) -> None:
        self._state = None
        newest = next(reversed(self.queue.values()), None)
        self.queue[request.request_id] = request
        if newest is not None and newest.arrival_time > request.arrival_time:
            self.queue = dict(sorted(self.queue.items(), key=lambda item: item[1].arrival_time))
            self._candidates.look_again()
        else:
            self._candidates.add(request, self.adapters)

    def schedule(self, now: float) -> Batch | None:
        """The next batch, or None when nothing can run now."""
        if self._state is None or self._state.now != now:
            self.propose(now)
        state, self._state = self._state, None
        assert state is not None, "propose() sets it"
        draft = self._take(self.choice, now)
        self._candidates.stepped(goes_on=draft.goes_on)
        self.features = draft.foreseen(self.choice)
        self.policy.ran(state, self.choice, [sequence.request_id for sequence in draft.sequences])
        return self._batch(draft.sequences)

    def propose(self, now: float) -> tuple[QueueState, Choice]:
        """What is seen, and what ``schedule`` carries out if it comes at the same time, with no change before."""
        if self.adapters.pins.has_unmet or not self._candidates.are_here(self.adapters):
            want_adapters(self.queue.values(), self.adapters, self.limits.max_adapter_wait, now)
        self._state = self._look(now)
        self.choice = self.policy.choose(self._state)
        return self._state, self.choice

    def repeated(self, requests: list[Request], starts: Sequence[float], begun: Collection[Request] = ()) -> None:
        """Steps that began at these times, the first when ``propose`` was asked, took these requests, as it chose.

        All of them decode, or have ``begun`` with their whole prompt.
        """
        self._state = None
        self._candidates.decode([request.request_id for request in begun])
        self.adapters.touch(requests)
        self.policy.repeat([request.request_id for request in requests], starts)
        self._step += len(starts)

    def finish(self, request: Request, reason: str, stop_reason: int | None = None) -> None:
        """End a request, wherever it stands, and give back all that it holds."""
        self._forget(request)
        self.queue.pop(request.request_id, None)
        self.held.pop(request.request_id, None)
        self.policy.forget([request.request_id])
        if self._starts:
            # It came with its KV and was in no batch yet: the executor need not hear of it any more.
            self._starts = [start for start in self._starts if start.request_id != request.request_id]
        self.blocks.free(request.request_id)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason

    def look_again(self) -> None:
        """A request has other tokens to compute than could be foreseen."""
        self._candidates.look_again()

    def publish(self, requests: Iterable[Request]) -> None:
        """Offer the full blocks of running requests, as far as their tokens are known, to later prompts."""
        if not self.limits.enable_prefix_caching:
            return
        for request in requests:
            if request.status is RequestStatus.RUNNING:
                self._publish(request)

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks."""
        self._candidates.look_again()
        request.num_preemptions += 1
        self.num_preemptions += 1
        # Copies out come before copies in: a host block that a copy in reads in this step must not be overwritten.
        may_swap = self.limits.preemption != "recompute" and not self._swap_ins
        copies = self.blocks.swap_out(request.request_id) if may_swap else None
        if copies is not None:
            self._swap_outs += copies
            request.status = RequestStatus.SWAPPED
            return
        self.blocks.free(request.request_id)
        request.num_computed_tokens = 0
        request.status = RequestStatus.WAITING

    def _look(self, now: float) -> QueueState:
        return QueueState(
            candidates=self._candidates.of(self.queue.values(), self.adapters),
            now=now,
            max_num_seqs=self.limits.max_num_seqs,
            max_num_batched_tokens=self.limits.max_num_batched_tokens,
            max_loras=self.adapters.space.num_slots,
            merged_adapter=self.merged_adapter(),
            mergeable=self.mergeable,
            can_host=self.can_host,
            holds_merged=self.holds_merged,
        )

    def _take(self, choice: Choice, now: float) -> Draft:
        """What was chosen, in its order, while tokens and blocks last."""
        budget = self.limits.max_num_batched_tokens
        # Every decode behind a prompt keeps its token, so that no prompt makes all others wait for a step.
        decodes, features = len(choice.candidates), choice.features
        if features is None or features.decode_sequences != decodes or decodes >= budget:
            decodes = sum([candidate.num_new_tokens == 1 for candidate in choice.candidates])
        draft = Draft(choice.candidates, choice.urgent)
        queue, blocks, leases, used = self.queue, self.blocks, self.adapters.on_device, []
        sequences, settled, caches = draft.sequences, draft.settled, self.limits.enable_prefix_caching
        for candidate in choice.candidates:
            is_decode = candidate.num_new_tokens == 1
            decodes -= is_decode
            if budget <= 0:
                break
            request_id, slot = candidate.request_id, NO_ADAPTER
            if request_id in settled:
                continue
            request = queue[request_id]
            adapter = request.adapter
            if adapter is not None:
                # The executor runs everything in order: once this batch is submitted, the slot may go to another
                # adapter.
                lease = leases.get(adapter.content_hash)
                if lease is None:
                    continue
                slot = lease.slot
                used.append(request)
            sequence = decode_of(request, slot, blocks)
            if sequence is None:
                room = budget if is_decode else min(budget, max(1, budget - decodes))
                sequence = self._place(request, slot, room, draft)
                if sequence is None:
                    continue
            if caches:
                # Already now: every layer writes all keys and values of a batch before it reads any, so that
                # twins in the same batch share blocks.
                self._publish(request)
            sequences.append(sequence)
            settled.add(request_id)
            budget -= len(sequence.token_ids)
            draft.goes_on &= is_decode
            request.last_scheduled = now
            if request.first_scheduled is None:
                request.first_scheduled = now
        self.adapters.touch(used)
        return draft

    def _place(self, request: Request, slot: int, room: int, draft: Draft) -> ScheduledSequence | None:
        """Up to ``room`` tokens of a request, if there are blocks for them."""
        is_running = request.status is RequestStatus.RUNNING
        draft.goes_on &= is_running
        num_new = self._grow(request, room, draft) if is_running else self._admit(request, room, draft)
        return part_of(request, num_new, slot, self.blocks) if num_new else None

    def _grow(self, request: Request, room: int, draft: Draft) -> int:
        """Blocks for the next tokens of a running request; 0 when it had to give up those it had."""
        num_new = min(num_runnable(request, self.limits.max_model_len), room)
        while num_new and not self.blocks.grow(request.request_id, request.num_computed_tokens + num_new):
            victim = draft.victim_to_grow(self.queue)
            self.preempt(victim)
            draft.settled.add(victim.request_id)
            draft.may_start = False
            if victim is request:
                return 0
        return num_new

    def _admit(self, request: Request, room: int, draft: Draft) -> int:
        """Blocks for the first tokens of a request that has none on the device; 0 when there are too few."""
        while draft.may_start:
            bring = self._resume if request.status is RequestStatus.SWAPPED else self._start
            if num_new := bring(request, room):
                request.status = RequestStatus.RUNNING
                return num_new
            victim = draft.victim_to_admit(self.queue, request)
            if victim is None:
                draft.may_start = False
            else:
                self.preempt(victim)
                draft.settled.add(victim.request_id)
        return 0

    def _resume(self, request: Request, room: int) -> int:
        num_new = min(request.num_tokens - request.num_computed_tokens, room)
        copies = self.blocks.swap_in(request.request_id, request.num_computed_tokens + num_new)
        if copies is None:
            return 0
        self._swap_ins += copies
        request.num_published_blocks = 0
        return num_new

    def _start(self, request: Request, room: int) -> int:
        prefix = self._cached_prefix(request)
        num_cached = len(prefix) * self.blocks.block_size
        num_new = min(request.num_tokens - num_cached, room)
        if not self.blocks.allocate(request.request_id, prefix, num_cached + num_new):
            return 0
        request.num_computed_tokens = num_cached
        request.num_published_blocks = len(prefix)
        if not request.num_preemptions:
            # The first start of all: a preempted request is known to the executor already.
            request.num_cached_tokens = num_cached
            self.prefix_queries += request.num_tokens
            self.prefix_hits += num_cached
            self._starts.append(start_of(request))
        return num_new

    def _cached_prefix(self, request: Request) -> list[int]:
        # Prompt scores need the logits of every prompt position, so nothing can be skipped.
        if not self.limits.enable_prefix_caching or request.wants_prompt_logprobs:
            return []
        extend_block_hashes(request, self.blocks.block_size)
        usable = (request.num_tokens - 1) // self.blocks.block_size
        return self.blocks.find_prefix(request.block_hashes[:usable])

    def _publish(self, request: Request) -> None:
        extend_block_hashes(request, self.blocks.block_size)
        full = min(request.num_computed_tokens, request.num_known_tokens) // self.blocks.block_size
        for index in range(request.num_published_blocks, full):
            self.blocks.publish(request.request_id, index, request.block_hashes[index])
        request.num_published_blocks = full

    def _batch(self, scheduled: list[ScheduledSequence]) -> Batch | None:
        if not scheduled and not self._swap_outs:
            return None
        # Rows of one adapter stand together, so that its weights are read once per layer.
        scheduled.sort(key=_SLOT)
        merged = self.choice.merged_adapter if scheduled else self.merged_adapter()
        batch = Batch(
            self._step,
            scheduled,
            self._starts,
            self._swap_outs,
            self._swap_ins,
            merged_adapter=merged,
            merged_slot=self.adapters.slot(merged) if merged is not None and scheduled else NO_ADAPTER,
        )
        self._step += 1
        self._starts, self._swap_outs, self._swap_ins = [], [], []
        return batch
