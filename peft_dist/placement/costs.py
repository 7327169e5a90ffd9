"""What one replica charges for work: what plans are made with, from the costs that it reports."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from peft_dist.core.step_costs import StepCosts

Affine = tuple[float, float]
"""(seconds, seconds per byte)."""
NEVER: Affine = (1e9, 0.0)
"""What a way costs that there is not."""


class ReplicaCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of one replica's work, all of zero or more.

    Attributes:
        prefill_token: Of one prompt token.
        decode_token: Of one output token: a request's share of a full step.
        load: Bring an adapter from the host to the device.
        fetch: Bring an adapter to the host, from disk or from another replica.
        transfer: Bring a request's KV from another replica.
        swap_block: Bring one KV block to the host and back, paid for blocks beyond the replica's.
        move: Hand over one request, whatever its size.
        merged: An output token's seconds on a replica that runs its adapter merged, as a part of ``decode_token``.
    """

    prefill_token: float = 5e-5
    decode_token: float = 5e-4
    load: Affine = (1e-3, 1e-10)
    fetch: Affine = (1e-2, 1e-9)
    transfer: Affine = (1e-3, 1e-10)
    swap_block: float = 1e-4
    move: float = 5e-3
    merged: float = 1.0

    @classmethod
    def of(
        cls,
        costs: StepCosts,
        num_base: int,
        adapters: Mapping[str, tuple[int, int]],
        block_size: int = 16,
        transfer: Affine | None = None,
    ) -> ReplicaCosts:
        """From what a replica reports, for decode steps of a full batch.

        Args:
            costs: Of the replica.
            num_base: Sequences of the base in the batch.
            adapters: Sequences and rank rows of each adapter in it. With ``num_base``, one sequence at least.
            block_size: Tokens of a KV block: those beyond the pool are taken to be computed again.
            transfer: None where KV cannot be moved.
        """
        batch = num_base + sum(number for number, _ in adapters.values())
        prefill, step = costs.prefill_seconds(1), costs.decode_seconds(num_base, adapters)
        return cls(
            prefill_token=prefill,
            decode_token=step / batch,
            load=costs.load,
            fetch=costs.fetch,
            transfer=transfer or NEVER,
            swap_block=prefill * block_size,
            merged=1.0 if costs.switch is None else min(1.0, costs.merged_ratio(batch, step)),
        )


def seconds(cost: Affine, num_bytes: int) -> float:
    """Of moving so many bytes."""
    return cost[0] + cost[1] * num_bytes
