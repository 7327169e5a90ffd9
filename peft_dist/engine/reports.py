"""What an engine tells of itself to those who route to it and who watch it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from peft_dist.core.cost_model import CostModel
from peft_dist.core.messages import ReplicaDetail, ReplicaStats, SequenceProgress
from peft_dist.core.request import Request, RequestStatus
from peft_dist.core.step_costs import StepCosts
from peft_dist.engine.executor import Executor
from peft_dist.engine.scheduler import Scheduler


class StepCounts(NamedTuple):
    """Since the engine was made."""

    steps: int
    merged_steps: int
    switches: int
    switch_seconds: float


def stats_of(scheduler: Scheduler, last_batch: Iterable[Request]) -> ReplicaStats:
    """Requests that a step passes over, because another adapter is merged, wait, though they keep their blocks."""
    running = swapped = 0
    for request in last_batch:
        if request.status is RequestStatus.RUNNING:
            running += 1
    if scheduler.blocks.num_swapped:
        swapped = sum(request.status is RequestStatus.SWAPPED for request in scheduler.queue.values())
    held = len(scheduler.queue) - swapped
    return ReplicaStats(
        num_running=running,
        num_waiting=held - running,
        num_swapped=swapped,
        num_free_blocks=scheduler.blocks.num_free,
        num_blocks=scheduler.blocks.num_blocks,
        num_preemptions=scheduler.num_preemptions,
        prefix_cache_queries=scheduler.prefix_queries,
        prefix_cache_hits=scheduler.prefix_hits,
        resident_adapters=scheduler.adapters.resident,
    )


def detail_of(
    scheduler: Scheduler,
    executor: Executor,
    requests: Collection[Request],
    last_batch: Iterable[Request],
    steps: StepCounts,
    cost: CostModel,
    *,
    merges: bool = False,
) -> ReplicaDetail:
    """``requests``: all that have not ended; ``last_batch``: those of the step submitted last, ended or not;
    ``merges``: whether adapters are merged for the time that this gains."""
    running = {r.request_id for r in last_batch if r.status is RequestStatus.RUNNING}
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for request in requests:
        counts[request.request_id in running][request.content_hash] += 1
    policy, adapters = scheduler.policy, scheduler.adapters
    return ReplicaDetail(
        merged_adapter=executor.merged_adapter(),
        num_steps=steps.steps,
        num_merged_steps=steps.merged_steps,
        num_switches=steps.switches,
        switch_seconds=steps.switch_seconds,
        waiting=dict(counts[False]),
        running=dict(counts[True]),
        policy=policy.report(),
        credits=policy.credits,
        adapters=executor.residency(),
        peak_memory_bytes=executor.peak_memory_bytes(),
        num_adapter_loads=adapters.loads,
        num_adapter_evictions=adapters.evictions,
        costs=StepCosts.of(cost, merges=merges),
    )


def progress_of(
    request: Request, token_ids: list[int], first: int, logprobs: Any, error: str | None = None
) -> SequenceProgress:
    """New tokens of a request, the first of which is number ``first`` of all; and its end, if it has ended."""
    scores_due = first == 0 and request.params.prompt_logprobs is not None
    # ``queue_seconds``, written out: it is told with every token.
    began, waited = request.first_scheduled, None
    if began is not None and (waited := began - request.arrival_time) < 0.0:
        waited = 0.0
    return SequenceProgress(
        request.request_id,
        token_ids,
        first,
        logprobs,
        request.prompt_logprobs if scores_due else None,
        request.finish_reason,
        request.stop_reason,
        request.num_cached_tokens,
        error,
        waited,
    )
