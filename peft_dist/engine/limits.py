"""What bounds every batch of one replica."""

from __future__ import annotations

from dataclasses import dataclass

from peft_dist.core.config import Preemption


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a batch and a sequence may be at most, in sequences and tokens, and how blocks are won back.

    ``max_adapter_wait``: Seconds after which a waiting request's adapter may take the room of younger ones'.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    enable_prefix_caching: bool = True
    preemption: Preemption = "auto"
    max_adapter_wait: float = 5.0
