"""An adapter that is read where it lies in the LoRA pool, and weights that it can be merged into from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from peft_dist.kernels.backend import has_triton
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.kernels.types import LoRALayerWeights


@dataclass(frozen=True, slots=True)
class PooledAdapter:
    """A resident adapter.

    Attributes:
        paths: Of every layer of the pool in its model, by ``lora_index``.
    """

    pool: LoRAPool
    slot: int
    paths: Mapping[int, str]

    @property
    def ranks(self) -> Mapping[int, int]:
        """By ``lora_index``, of the layers that it adapts."""
        return self.pool.ranks(self.slot)


class PooledItem(NamedTuple):
    """One weight to merge a slot of the pool into: ``out = base + scaling * B @ A``.

    Attributes:
        out, base: As in ``MergeItem``, of unit stride in their columns.
        weights: The layer in the pool, with tables on the device.
        turned: The weight is stored ``[in, out]`` (Conv1D, embeddings): the transposed product is added.
    """

    out: torch.Tensor
    base: torch.Tensor
    weights: LoRALayerWeights
    turned: bool

    @property
    def reason_against(self) -> str | None:
        """Why this weight cannot be merged from the pool; None when it can."""
        out, base, held = self.out, self.base, self.weights
        sizes = (held.A.shape[1], held.B.shape[1]) if self.turned else (held.B.shape[1], held.A.shape[1])
        if tuple(out.shape) != sizes or base.shape != out.shape or base.dtype != out.dtype:
            return f"the pool's layer makes {list(sizes)}, which does not fit {list(base.shape)} and {list(out.shape)}"
        if out.stride(1) != 1 or base.stride(1) != 1:
            return f"rows lie scattered in strides of {base.stride()} and {out.stride()}"
        if held.pages_t is None or held.rank_t is None or held.scaling_t is None:
            return "the pool keeps no tables on the device"
        return None


def can_merge_from_pool(device: torch.device) -> bool:
    """Whether there is a kernel for it: on a GPU, with Triton."""
    return device.type == "cuda" and has_triton()
