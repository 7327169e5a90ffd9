"""One replica's control loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.batch import Batch, ScheduledSequence, SequenceResult, StepResult
from peft_dist.core.messages import ReplicaStats, SequenceProgress
from peft_dist.core.request import Request
from peft_dist.engine.executor import Executor
from peft_dist.engine.scheduler import Scheduler
from peft_dist.engine.stopping import check_stop


class Engine:
    """Schedules, submits, collects. Knows no torch, no clock and no socket.

    ``depth`` batches may be in flight while the next one is scheduled: 0 waits for each step, 1 lets the
    device run step n while step n + 1 is prepared.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, depth: int, eos_token_ids: Iterable[int]) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.depth = depth
        self.eos_token_ids = frozenset(eos_token_ids)
        self.requests: dict[str, Request] = {}
        self.adapters: dict[str, AdapterSpec] = {}
        self._in_flight: deque[tuple[Batch, list[Request], Any]] = deque()

    @property
    def has_work(self) -> bool:
        return bool(self.requests or self._in_flight)

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

    def register_adapter(self, spec: AdapterSpec) -> None:
        self.adapters[spec.content_hash] = spec
        self.scheduler.adapters.keep(spec.content_hash)

    def forget_adapter(self, content_hash: str) -> None:
        """Take no more requests for an adapter; it leaves the device when the last running one has ended."""
        self.adapters.pop(content_hash, None)
        self.scheduler.adapters.forget(content_hash)
        self._apply_adapter_changes()

    def step(self, now: float) -> list[SequenceProgress]:
        """Submit the next batch if there is one; collect the oldest when enough are in flight."""
        batch = self.scheduler.schedule()
        self._apply_adapter_changes()
        if batch is not None:
            requests = [self.requests[sequence.request_id] for sequence in batch.sequences]
            self._in_flight.append((batch, requests, self.executor.submit(batch)))
        if self._in_flight and (batch is None or len(self._in_flight) > self.depth):
            oldest, requests, handle = self._in_flight.popleft()
            return self._update(oldest, requests, self.executor.collect(handle))
        return []

    def stats(self) -> ReplicaStats:
        scheduler = self.scheduler
        return ReplicaStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_swapped=len(scheduler.swapped),
            num_free_blocks=scheduler.blocks.num_free,
            num_blocks=scheduler.blocks.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.prefix_queries,
            prefix_cache_hits=scheduler.prefix_hits,
            resident_adapters=scheduler.adapters.resident,
        )

    def _apply_adapter_changes(self) -> None:
        for slot, spec in self.scheduler.adapters.take_changes():
            if spec is None:
                self.executor.drop_adapter(slot)
            else:
                self.executor.load_adapter(spec, slot)
        for content_hash in self.scheduler.adapters.take_discards():
            self.executor.discard_adapter(content_hash)

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
            if not request.is_finished:
                progress += self._update_request(request, sequence, outcome)
        self.scheduler.publish(requests)
        return progress

    def _update_request(
        self, request: Request, sequence: ScheduledSequence, outcome: SequenceResult
    ) -> list[SequenceProgress]:
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
            stop = check_stop(request, self.eos_token_ids, self.scheduler.limits.max_model_len)
            if stop:
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
        return [self._progress(request, kept, first, scores)]

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
            self._apply_adapter_changes()
        first = len(request.output_token_ids) if first_index is None else first_index
        return self._progress(request, token_ids or [], first, logprobs, error)

    def _progress(
        self, request: Request, token_ids: list[int], first: int, logprobs: Any, error: str | None = None
    ) -> SequenceProgress:
        scores_due = request.params.prompt_logprobs is not None and first == 0
        return SequenceProgress(
            request_id=request.request_id,
            token_ids=token_ids,
            first_index=first,
            logprobs=logprobs,
            prompt_logprobs=request.prompt_logprobs if scores_due else None,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            num_cached_tokens=request.num_cached_tokens,
            error=error,
        )
