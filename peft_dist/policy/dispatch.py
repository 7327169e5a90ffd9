"""To which replica a request goes: the one that is expected to finish it soonest (dLoRA, OSDI'24, section 4.1).

The paper estimates with the mean time of an adapter's requests; this does with the replica's own measured costs, what
is left of everything that was sent to it, whether it holds the adapter on its device, and how much of the prompt it
has computed before.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from peft_dist.core.step_costs import StepCosts


@dataclass(frozen=True, slots=True)
class Work:
    """What a request asks of a replica.

    Attributes:
        num_sequences: Sequences drawn from one prompt.
        prompt_tokens: Tokens whose KV is to be computed.
        output_tokens: Tokens that are expected to be drawn for each sequence.
        adapter: Content hash, "" for the base.
        rank_rows, num_bytes: Of the adapter.
    """

    num_sequences: int
    prompt_tokens: int
    output_tokens: float
    adapter: str = ""
    rank_rows: int = 0
    num_bytes: int = 0


@dataclass(slots=True)
class Backlog:
    """What is left of the work that was sent to one replica; kept up to date by who sends it.

    Attributes:
        num_sequences: Unfinished sequences, running or waiting.
        prefill_tokens: Prompt tokens of those that have drawn nothing yet.
        output_tokens: Tokens that all of them are expected to draw.
        adapters: Unfinished sequences and rank rows of each adapter, without the base.
    """

    num_sequences: int = 0
    prefill_tokens: int = 0
    output_tokens: float = 0.0
    adapters: dict[str, tuple[int, int]] = field(default_factory=dict)

    def count(self, adapter: str, rank_rows: int, change: int) -> None:
        """Note that ``change`` sequences came (or went, if it is negative)."""
        self.num_sequences += change
        if not adapter:
            return
        number = self.adapters.get(adapter, (0, 0))[0] + change
        self.adapters[adapter] = (number, rank_rows)
        if not number:
            del self.adapters[adapter]


@dataclass(frozen=True, slots=True)
class Target:
    """A replica that could take the request.

    ``resident`` are the adapters on its device, ``on_host`` those in its host memory; ``max_num_seqs`` and
    ``capacity_tokens`` bound what runs at once: the rest waits. ``cached_tokens`` of the prompt are expected in
    its prefix cache.
    """

    replica_id: int
    costs: StepCosts
    backlog: Backlog
    resident: Set[str]
    max_num_seqs: int
    capacity_tokens: int
    on_host: Set[str] = frozenset()
    cached_tokens: int = 0


def finish_seconds(work: Work, target: Target) -> float:
    """Seconds until the last token of a request that is sent now."""
    backlog, costs = target.backlog, target.costs
    size = max(work.prompt_tokens + work.output_tokens, 1.0)
    slots = max(1, min(target.max_num_seqs, int(target.capacity_tokens / size)))
    adapters = dict(backlog.adapters)
    if work.adapter:
        before = adapters.get(work.adapter, (0, 0))[0]
        adapters[work.adapter] = (before + work.num_sequences, work.rank_rows)
    total = backlog.num_sequences + work.num_sequences
    num_base = total - sum(number for number, _ in adapters.values())
    step = costs.decode_seconds(num_base, adapters, min(1.0, slots / total))
    steps_ahead = 0.0 if total <= slots else backlog.output_tokens / slots
    load = 0.0
    if work.adapter and work.adapter not in target.resident:
        load = costs.load_seconds(work.num_bytes, on_host=work.adapter in target.on_host)
    prefill = costs.prefill_seconds(backlog.prefill_tokens + max(work.prompt_tokens - target.cached_tokens, 0))
    return load + prefill + (steps_ahead + work.output_tokens) * step


def choose(work: Work, targets: Sequence[Target]) -> int:
    """The replica with the earliest finish; among equals the one with fewer sequences, then the first.

    ``targets`` must not be empty."""
    return min(targets, key=lambda t: (finish_seconds(work, t), t.backlog.num_sequences)).replica_id
