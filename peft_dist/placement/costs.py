"""What one replica charges for work: the linear part of its cost model that plans are made with."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from peft_dist.core.cost_model import CostModel, StepFeatures

Affine = tuple[float, float]
"""(seconds, seconds per byte)."""


class ReplicaCosts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of one replica's work, all of zero or more.

    Attributes:
        prefill_token: Of one prompt token.
        decode_token: Of one output token: a request's share of a step of the usual batch.
        load: Bring an adapter from the host to the device.
        fetch: Bring an adapter to the host, from disk or from another replica.
        transfer: Bring a request's KV from another replica.
        swap_block: Bring one KV block to the host and back, paid for blocks beyond the replica's.
        move: Hand over one request, whatever its size.
    """

    prefill_token: float = 5e-5
    decode_token: float = 5e-4
    load: Affine = (1e-3, 1e-10)
    fetch: Affine = (1e-2, 1e-9)
    transfer: Affine = (1e-3, 1e-10)
    swap_block: float = 1e-4
    move: float = 5e-3

    @classmethod
    def of(
        cls,
        model: CostModel,
        batch: int,
        rank: int = 16,
        adapters: int = 1,
        block_bytes: int = 0,
        fetch: Affine = (1e-2, 1e-9),
    ) -> ReplicaCosts:
        """From a replica's cost model, for decode steps of ``batch`` sequences on ``adapters`` adapters of ``rank``."""
        rows = [(str(index % adapters) if adapters else "", 1, rank) for index in range(batch)]
        features = StepFeatures.of(rows)
        # A prompt token beside a decode batch: what the step grows by.
        grown = StepFeatures.of([*rows, ("0" if adapters else "", 2, rank)])
        step = model.step_seconds(features)
        return cls(
            prefill_token=(model.step_seconds(grown) - step) / 2,
            decode_token=step / batch,
            load=_affine(model.load_seconds),
            fetch=fetch,
            transfer=_affine(model.transfer_seconds),
            swap_block=2 * (model.swap_seconds(block_bytes) - model.swap_seconds(0)),
        )


def seconds(cost: Affine, num_bytes: int) -> float:
    """Of moving so many bytes."""
    return cost[0] + cost[1] * num_bytes


def _affine(predict: Callable[[int], float]) -> Affine:
    base = predict(0)
    return base, (predict(1 << 30) - base) / (1 << 30)
