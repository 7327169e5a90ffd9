"""How a running request gets to another replica."""

from __future__ import annotations

from peft_dist.core.step_costs import StepCosts


def moves_kv(costs: StepCosts, num_tokens: int, num_bytes: int) -> bool:
    """Whether bringing the KV of so many tokens takes less time than computing it again, where it goes.

    Args:
        costs: Of the replica that it goes to.
        num_bytes: Of the KV; 0 where that is not known, and then it is computed again.
    """
    return num_bytes > 0 and costs.transfer_seconds(num_bytes) < costs.prefill_seconds(num_tokens)
