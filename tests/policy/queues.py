"""Queues written as strings: a letter is a request of that adapter, "-" one of the base, the oldest first."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from peft_dist.core.cost_model import CostModel
from peft_dist.policy.batching import BatchingPolicy, Candidate, Choice, QueueState
from peft_dist.policy.queue_view import QueueView


def queue(
    letters: str,
    *,
    merged: str | None = None,
    now: float = 0.0,
    seats: int = 16,
    loras: int = 64,
    tokens: int = 4096,
    prompts: dict[int, int] | None = None,
    absent: Collection[str] = (),
    rank: int = 16,
    mergeable: Callable[[str], bool] = lambda adapter: True,
    can_host: Callable[[str], bool] = lambda adapter: True,
) -> QueueState:
    """Request ``i`` is called "a0", "b1", ... after its letter and place; ``prompts`` gives tokens by place."""
    candidates = [
        Candidate(
            f"{letter}{i}",
            "" if letter == "-" else letter,
            float(i),
            (prompts or {}).get(i, 1),
            0 if letter == "-" else rank,
            letter not in absent,
        )
        for i, letter in enumerate(letters)
    ]
    return QueueState(candidates, now, seats, tokens, loras, merged, mergeable, can_host)


def view(letters: str, cost: CostModel | None = None, **kwargs: Any) -> QueueView:
    return QueueView(queue(letters, **kwargs), cost or CostModel.paper())


def ids(choice: Choice) -> list[str]:
    return [candidate.request_id for candidate in choice.candidates]


def step(policy: BatchingPolicy, state: QueueState, scheduled: Collection[str] | None = None) -> Choice:
    """Choose, and let everything chosen run."""
    choice = policy.choose(state)
    policy.ran(state, choice, ids(choice) if scheduled is None else scheduled)
    return choice
