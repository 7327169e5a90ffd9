"""One replica's control loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.batch import NO_ADAPTER, Batch, ScheduledSequence, SequenceResult, StepResult
from peft_dist.core.cost_model import CostModel
from peft_dist.core.messages import ReplicaDetail, ReplicaStats, SequenceProgress
from peft_dist.core.request import Request, RequestStatus
from peft_dist.engine.adapter_changes import apply_changes
from peft_dist.engine.decisions import Decision, describe, features_of
from peft_dist.engine.executor import Executor
from peft_dist.engine.in_flight import Submitted
from peft_dist.engine.reports import StepCounts, detail_of, progress_of, stats_of
from peft_dist.engine.scheduler import Scheduler
from peft_dist.engine.stopping import check_stop
from peft_dist.engine.switching import Switch, Switcher


class Engine:
    """Schedules, submits, collects. Knows no torch, no clock and no socket.

    ``depth`` batches may be in flight while the next one is scheduled: 0 waits for each step, 1 lets the
    device run step n while step n + 1 is prepared.

    Args:
        cost: Learns from every step and switch; the batching policy predicts with it.
        on_decision: Hears of every submitted step.

    Attributes:
        on_start: Hears the ids of the requests that a step about to be submitted is the first one of.
        residency_version: Grows whenever an adapter was registered, forgotten, brought to the device or put out of it.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        depth: int,
        eos_token_ids: Iterable[int],
        cost: CostModel | None = None,
        on_decision: Callable[[Decision], None] | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.depth = depth
        self.eos_token_ids = frozenset(eos_token_ids)
        self._ends = self.eos_token_ids, scheduler.limits.max_model_len
        self.cost = cost or CostModel()
        self.on_decision = on_decision
        self.on_start: Callable[[list[str]], None] | None = None
        self.requests: dict[str, Request] = {}
        self.adapters: dict[str, AdapterSpec] = {}
        self.num_steps = 0
        self.num_merged_steps = 0
        self.residency_version = 0
        self._in_flight: deque[Submitted] = deque()
        self._last_batch: list[Request] = []
        self._found_nothing = False
        self._failed: list[SequenceProgress] = []
        self._switcher = Switcher(executor, self.cost)
        self.scheduler.mergeable = self._can_merge
        self.scheduler.can_host = self._can_host
        self.scheduler.merged_adapter = executor.merged_adapter
        self.scheduler.holds_merged = executor.holds_merged

    @property
    def num_switches(self) -> int:
        return self._switcher.num_switches

    @property
    def switch_seconds(self) -> float:
        return self._switcher.seconds

    @property
    def has_work(self) -> bool:
        is_runnable = len(self.requests) > len(self.scheduler.held)
        return is_runnable or bool(self._in_flight or self.scheduler.adapters.loading)

    @property
    def waits_for_load(self) -> bool:
        """The last step found nothing to run, and a load is under way: ``executor.fileno()`` tells when it has ended.

        A step makes sense before that only after requests came or went.
        """
        return self._found_nothing and bool(self.scheduler.adapters.loading)

    def has_settled(self, step: int) -> bool:
        """Whether every batch before this number has been collected."""
        return not self._in_flight or self._in_flight[0].batch.step >= step

    def add_request(self, request: Request) -> None:
        """Queue a request. Its id must be new and its adapter registered."""
        if request.request_id in self.requests:
            raise ValueError(f"request id {request.request_id!r} is already in use")
        if request.adapter is not None:
            if request.adapter.content_hash not in self.adapters:
                raise ValueError(f"adapter {request.adapter.name!r} is not registered with this replica")
            self.scheduler.adapters.add_user(request.adapter)
        self.requests[request.request_id] = request
        self.scheduler.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests now: their blocks are free when this returns. Unknown ids are ignored."""
        for request in [self.requests[i] for i in request_ids if i in self.requests]:
            self._finish(request, "abort")

    def check_room(self, spec: AdapterSpec, *, pinned: bool = False) -> None:
        """Raises AdapterError when an adapter could never be loaded, or would as a pinned one keep another out."""
        in_use = (request.adapter for request in self.requests.values() if request.adapter is not None)
        self.scheduler.adapters.check_room(spec, (*self.adapters.values(), *in_use), pinned=pinned)

    def register_adapter(self, spec: AdapterSpec, *, pinned: bool = False) -> None:
        """Take requests for an adapter from now on; a pinned one is loaded now, and stays (``check_room`` first)."""
        for other in self.adapters.values():
            if other.content_hash != spec.content_hash and (other.name == spec.name or other.path == spec.path):
                # Its files may be the new one's by now.
                self.scheduler.adapters.keep_weights(other.content_hash)
        self.adapters[spec.content_hash] = spec
        self.scheduler.adapters.keep(spec.content_hash)
        self.pin_adapter(spec.name, spec.content_hash if pinned else None)

    def pin_adapter(self, name: str, content_hash: str | None) -> None:
        """Have a name pin this registered content and no other; None: nothing."""
        if content_hash is None:
            self.scheduler.adapters.unpin(name)
        else:
            self.scheduler.adapters.pin(name, self.adapters[content_hash])
        self.apply_adapter_changes()
        self.residency_version += 1

    def prefetch_adapter(self, content_hash: str) -> None:
        """Bring an adapter to the device if there is room that no request uses; passed over once it was forgotten."""
        if (spec := self.adapters.get(content_hash)) is not None:
            self.scheduler.adapters.prefetch(spec)
            self.apply_adapter_changes()

    def forget_adapter(self, content_hash: str) -> None:
        """Take no more requests for an adapter; it leaves the device when the last running one has ended."""
        self.adapters.pop(content_hash, None)
        self.scheduler.adapters.forget(content_hash)
        self.residency_version += 1
        self.apply_adapter_changes()

    def step(self, now: float) -> list[SequenceProgress]:
        """Submit the next batch if there is one; collect the oldest when enough are in flight."""
        self.take_loaded()
        batch = self._schedule(now)
        if batch is None and not self._in_flight and self.scheduler.adapters.loading:
            # A load that was quick enough lets its requests run in this very step.
            self.take_loaded()
            batch = self._schedule(now)
        self._found_nothing = batch is None and not self._in_flight
        progress = self.take_failed()
        if batch is not None:
            self._submit(batch, now)
        if self._in_flight and (batch is None or len(self._in_flight) > self.depth):
            progress += self._collect(self._in_flight.popleft())
        return progress

    def repeated(self, requests: list[Request], count: int) -> None:
        """So many equal steps of these requests were taken, by ``Advance``."""
        self.num_steps += count
        self.num_merged_steps += count if self.executor.merged_adapter() is not None else 0
        self._last_batch, self._found_nothing = requests, False

    def told(self, request: Request, token: int, logprobs: Any = None) -> SequenceProgress:
        """What is to be reported of a request that was given this last token; it may have ended."""
        first = len(request.output_token_ids) - 1
        if stop := check_stop(request, *self._ends):
            return self._finish(request, *stop, token_ids=[token], first_index=first, logprobs=logprobs)
        return progress_of(request, [token], first, logprobs)

    def stats(self) -> ReplicaStats:
        """Cheap counts, for every report."""
        return stats_of(self.scheduler, self._last_batch)

    def detail(self) -> ReplicaDetail:
        """What people who watch this replica want to know; walks over the queue."""
        steps = StepCounts(self.num_steps, self.num_merged_steps, self.num_switches, self.switch_seconds)
        # Of all, not of those on the device: a replica that merges says so before the first one is there.
        merges = self.scheduler.policy.merges and any(map(self._switcher.can_merge, self.adapters.values()))
        requests = self.requests.values()
        return detail_of(self.scheduler, self.executor, requests, self._last_batch, steps, self.cost, merges=merges)

    def _submit(self, batch: Batch, now: float) -> None:
        requests = [self.requests[sequence.request_id] for sequence in batch.sequences]
        try:
            batch, switch = self._switch(batch) if batch.sequences else (batch, None)
            features = self.scheduler.features or features_of(batch, requests)
            self.num_steps += 1
            self.num_merged_steps += batch.merged_adapter is not None
            if self.on_decision is not None:
                seconds = switch.seconds if switch else 0.0
                self.on_decision(describe(self.scheduler, batch, features, self.cost, seconds, now))
            if self.on_start is not None and (new := [r.request_id for r in requests if r.first_scheduled == now]):
                self.on_start(new)
            handle = self.executor.submit(batch)
        except BaseException:
            # Their blocks were named when they were scheduled, and will not be written.
            for request in requests:
                self.scheduler.blocks.withdraw(request.block_hashes)
            raise
        self._in_flight.append(Submitted(batch, requests, features, switch, handle))
        self._last_batch = requests

    def _switch(self, batch: Batch) -> tuple[Batch, Switch | None]:
        """Have the weights hold what the batch needs, or let it run unmerged where its adapter cannot be merged."""
        target = batch.merged_adapter
        if target == self.executor.merged_adapter():
            return batch, None
        switch = self._switcher.switch(None if target is None else self._spec(target))
        if switch is None:
            batch = msgspec.structs.replace(batch, merged_adapter=None, merged_slot=NO_ADAPTER)
        return batch, switch

    def _spec(self, content_hash: str) -> AdapterSpec:
        if (spec := self.adapters.get(content_hash)) is None:
            # Unregistered, but its last requests are running out.
            spec = next(r.adapter for r in self.requests.values() if r.adapter and r.content_hash == content_hash)
        return spec

    def _can_merge(self, content_hash: str) -> bool:
        return self._switcher.can_merge(self.adapters.get(content_hash) or self._spec(content_hash))

    def _can_host(self, content_hash: str) -> bool:
        return self._switcher.can_host(self._spec(content_hash))

    def _collect(self, submitted: Submitted) -> list[SequenceProgress]:
        result = self.executor.collect(submitted.handle)
        if result.seconds is not None and submitted.batch.sequences:
            self.cost.observe_step(submitted.features, result.seconds)
        if result.switch_seconds is not None and submitted.switch is not None:
            self._switcher.took(submitted.switch, result.switch_seconds)
        if result.swap_seconds is not None:
            self.cost.observe_swap(result.swap_bytes, result.swap_seconds)
        return self._update(submitted.batch, submitted.requests, result)

    def _schedule(self, now: float) -> Batch | None:
        batch = self.scheduler.schedule(now)
        self.apply_adapter_changes()
        return batch

    def take_loaded(self) -> None:
        """Adapters that have arrived can run; requests for one that could not be loaded fail, and they alone."""
        for outcome in self.executor.take_loaded():
            self.residency_version += 1
            if outcome.error is None:
                spec = self.scheduler.adapters.loaded(outcome.content_hash)
                if outcome.copy_seconds is not None:
                    self.cost.observe_load(spec.num_bytes, outcome.copy_seconds)
                continue
            self.scheduler.adapters.load_failed(outcome.content_hash, outcome.error)
            failed = [r for r in self.requests.values() if r.adapter and r.content_hash == outcome.content_hash]
            self._failed += [self._finish(request, "error", error=outcome.error) for request in failed]

    def take_failed(self) -> list[SequenceProgress]:
        """Ends of requests whose adapter could not be loaded, each given out once."""
        failed, self._failed = self._failed, []
        return [msgspec.structs.replace(end, lacks_adapter=True) for end in failed]

    def apply_adapter_changes(self) -> None:
        """Have the executor do what was decided of adapters."""
        self.residency_version += apply_changes(self.scheduler.adapters, self.executor)

    def _update(self, batch: Batch, requests: list[Request], result: StepResult) -> list[SequenceProgress]:
        outcomes = {outcome.request_id: outcome for outcome in result.sequences}
        progress = []
        for request, sequence in zip(requests, batch.sequences, strict=True):
            outcome = outcomes[request.request_id]
            if outcome.error is not None:
                # Its KV may hold what made it fail: nobody may find it by its prefix, even if the request was
                # preempted or aborted meanwhile.
                self.scheduler.blocks.withdraw(request.block_hashes)
            # A request may have ended, and its id be in use again, while this batch ran.
            if request.status is RequestStatus.FINISHED:
                continue
            if len(outcome.token_ids) != 1 or outcome.prompt_logprobs is not None or outcome.error is not None:
                progress += self._update_request(request, sequence, outcome)
                continue
            # The short way, for almost all.
            request.num_in_flight -= sequence.samples
            (drawn := request.output_token_ids).append(outcome.token_ids[0])
            if len(drawn) < request.plain_end:
                progress.append(progress_of(request, outcome.token_ids, len(drawn) - 1, outcome.logprobs))
            else:
                progress.append(self.told(request, outcome.token_ids[0], outcome.logprobs))
        self.scheduler.publish(requests)
        return progress

    def _update_request(
        self, request: Request, sequence: ScheduledSequence, outcome: SequenceResult
    ) -> list[SequenceProgress]:
        self.scheduler.look_again()
        request.num_in_flight -= sequence.samples
        if outcome.error is not None:
            return [self._finish(request, "error", error=outcome.error)]
        if outcome.prompt_logprobs is not None:
            # A preempted prompt is computed again: positions that are already scored are not scored twice.
            request.prompt_logprobs += outcome.prompt_logprobs[len(request.prompt_logprobs) - sequence.start :]
        return self._append(request, sequence, outcome)

    def _append(self, request: Request, sequence: ScheduledSequence, outcome: SequenceResult) -> list[SequenceProgress]:
        first = len(request.output_token_ids)
        stop = None
        for token in outcome.token_ids:
            request.output_token_ids.append(token)
            if stop := check_stop(request, *self._ends):
                break
        kept = request.output_token_ids[first:]
        prompt_done = sequence.start + sequence.num_tokens >= len(request.prompt_token_ids)
        if not kept and not (prompt_done and request.max_output_tokens == 0):
            return []
        if not kept:
            stop = ("length", None)
        scores = outcome.logprobs[: len(kept)] if outcome.logprobs is not None else None
        if stop:
            return [self._finish(request, *stop, token_ids=kept, first_index=first, logprobs=scores)]
        return [progress_of(request, kept, first, scores)]

    def _finish(
        self,
        request: Request,
        reason: str,
        stop_reason: int | None = None,
        *,
        token_ids: list[int] | None = None,
        first_index: int | None = None,
        logprobs: Any = None,
        error: str | None = None,
    ) -> SequenceProgress:
        self.scheduler.finish(request, reason, stop_reason)
        del self.requests[request.request_id]
        self.executor.forget([request.request_id])
        if request.adapter is not None:
            self.scheduler.adapters.remove_user(request.adapter)
            self.apply_adapter_changes()
            is_last = not self.scheduler.adapters.has_users(request.content_hash)
        else:
            is_last = all(other.adapter is not None for other in self.requests.values())
        if is_last:
            self.scheduler.policy.forget_adapter(request.content_hash)
        first = len(request.output_token_ids) if first_index is None else first_index
        return progress_of(request, token_ids or [], first, logprobs, error)
