"""What the engine decided in each step, for a log that can be read again."""

from __future__ import annotations

import heapq
from collections import Counter

import msgspec

from peft_dist.core.batch import Batch
from peft_dist.core.cost_model import CostModel, StepFeatures
from peft_dist.core.request import Request, RequestStatus
from peft_dist.engine.scheduler import Scheduler

# A line is written every step, and a thousand adapters may have credits.
MAX_CREDITS = 32


class Decision(msgspec.Struct, frozen=True):
    """One step as it was submitted.

    Attributes:
        now: Seconds on the engine's clock.
        reason: The branch of the policy that decided.
        merged_adapter: Content hash of what the weights hold; None when unmerged.
        switch_seconds: What it took to get there from the mode before; None where only the device knows, later.
        predicted_seconds: What the cost model expects of the step itself.
        scheduled: Sequences of the batch by content hash ("" is the base).
        passed_over: The other unfinished requests, likewise.
        policy: The policy's own numbers (thresholds).
        credits: What the policy owes each adapter, by content hash; of more than ``MAX_CREDITS`` those furthest from
            zero.
    """

    step: int
    now: float
    reason: str
    merged_adapter: str | None
    switch_seconds: float | None
    predicted_seconds: float
    num_tokens: int
    scheduled: dict[str, int]
    passed_over: dict[str, int]
    num_waiting: int
    policy: dict[str, float]
    credits: dict[str, float] = {}


def features_of(batch: Batch, requests: list[Request]) -> StepFeatures:
    """What a step costs by; ``requests`` in the order of the batch."""
    rows = [
        (request.adapter.content_hash, len(sequence.token_ids), request.adapter.num_rank_rows)
        if request.adapter is not None
        else ("", len(sequence.token_ids), 0)
        for request, sequence in zip(requests, batch.sequences, strict=True)
    ]
    if batch.merged_adapter is None:
        return StepFeatures.of(rows)
    merged_rank = max((rank for adapter, _, rank in rows if adapter == batch.merged_adapter), default=0)
    return StepFeatures.of(rows, batch.merged_adapter, merged_rank)


def describe(
    scheduler: Scheduler,
    batch: Batch,
    features: StepFeatures,
    cost: CostModel,
    switch_seconds: float | None,
    now: float,
) -> Decision:
    scheduled = {sequence.request_id for sequence in batch.sequences}
    groups: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for request in scheduler.queue.values():
        groups[request.request_id not in scheduled][request.content_hash] += 1
    return Decision(
        step=batch.step,
        now=now,
        reason=scheduler.choice.reason,
        merged_adapter=batch.merged_adapter,
        switch_seconds=switch_seconds,
        predicted_seconds=cost.step_seconds(features),
        num_tokens=batch.num_tokens,
        scheduled=dict(groups[False]),
        passed_over=dict(groups[True]),
        num_waiting=scheduler.counts()[RequestStatus.WAITING],
        policy=scheduler.policy.report(),
        credits=_largest(scheduler.policy.credits),
    )


def _largest(credits: dict[str, float]) -> dict[str, float]:
    if len(credits) <= MAX_CREDITS:
        return credits
    return dict(heapq.nlargest(MAX_CREDITS, credits.items(), key=lambda item: abs(item[1])))
