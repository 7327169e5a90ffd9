"""The shrink of the layer that reads a gated activation, as a part of the kernel that makes it (``lora_gate_loop``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from peft_dist.kernels.lora_plans import GroupPlan
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan

# Every program of the expand adds the parts up again: more of them cost more than a launch.
_MOST_PARTS = 32


@dataclass(frozen=True, slots=True)
class ShrinkInGate:
    """Rank intermediates of one layer that a gate's kernel leaves in the workspace.

    Attributes:
        parts: Partial sums of each.
    """

    weights: LoRALayerWeights
    plan: LoRAPlan
    parts: int

    @classmethod
    def find(
        cls,
        x: torch.Tensor,
        gate: Sequence[LoRALayerWeights | None],
        weights: LoRALayerWeights | None,
        plan: LoRAPlan,
        launch: GroupPlan | None = None,
    ) -> ShrinkInGate | None:
        """None where the layer's shrink has to be a launch of its own, or nobody adapts it.

        Args:
            x: What the gate's layers read; the activation has its dtype.
            gate: Their weights, of which there are some.
            weights: Of the layer that reads the activation.
            launch: The gate's; None takes the best that is known.
        """
        from peft_dist.kernels.lora_group import group_of, tiles_of

        tiles = tiles_of(plan, x.device)
        group = group_of([w for w in gate if w is not None])
        if weights is None or not tiles.is_static or tiles.tile_rows != 16:
            return None
        same = x.dtype == group.dtype == weights.A.dtype and group.page_rows == weights.page_rows
        if not same or weights.A.shape[1] != group.out_features[0] or x.dtype == torch.float32:
            return None
        launch = group.plan(tiles, False, launch)
        parts = parts_of(group.out_features[0], launch.gate_loop_n) if launch.joins_down and launch.gate_loop_n else 0
        return cls(weights, plan, parts) if 0 < parts <= _MOST_PARTS else None

    def finish_(self, ys: Sequence[torch.Tensor]) -> None:
        """Add the adapters' parts to the layer's output, the only one of ``ys``, once the gate's kernel is queued."""
        from peft_dist.kernels import lora_triton
        from peft_dist.kernels.lora_group import group_of, tiles_of

        launch = group_of([self.weights]).plan(tiles_of(self.plan, ys[0].device), wide=False)
        lora_triton.lora_expand_group_(
            ys, [self.weights], self.plan, launch=replace(launch, split=self.parts, pdl=False), place=1
        )


def parts_of(width: int, loop_n: int) -> int:
    """Partial sums of an activation of this width: one for each half of what a program of a full tile has."""
    return -(-width // (loop_n // 2))
