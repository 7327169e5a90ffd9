"""Merged with corrections: others join a merged batch, and their rows take the merged delta off again."""

from __future__ import annotations

from peft_dist.policy.batching import Candidate, Choice
from peft_dist.policy.queue_view import QueueView


def with_corrections(view: QueueView, choice: Choice, leader: str | None, horizon: float) -> Choice:
    """``choice``, or a batch around a merged adapter if that is predicted to compute more tokens a second.

    The adapter is that of ``choice``, the one merged now, or ``leader``, if it can host others. Switches count as
    spread over ``horizon`` steps.
    """
    options = dict.fromkeys((choice.merged_adapter, view.state.merged_adapter, leader))
    hosts = [adapter for adapter in filter(None, options) if adapter in view.groups and view.can_host(adapter)]
    best, best_rate = choice, _rate(view, choice.candidates, choice.merged_adapter, horizon)
    for adapter in hosts:
        batch = view.joined(adapter)
        rate = _rate(view, batch, adapter, horizon)
        if rate > best_rate and any(candidate.adapter != adapter for candidate in batch):
            best, best_rate = Choice(adapter, batch, "corrected"), rate
    return best


def _rate(view: QueueView, batch: list[Candidate], merged_adapter: str | None, horizon: float) -> float:
    """Predicted tokens a second."""
    features = view.features(batch, merged_adapter)
    seconds = view.cost.step_seconds(features) + view.switch(view.state.merged_adapter, merged_adapter) / horizon
    return (features.decode_sequences + features.prefill_tokens) / max(seconds, 1e-9)
