"""A layer's adapters as the Triton kernels read them: weights, and tables of ranks, scalings and pages."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from peft_dist.kernels.transfer import to_device
from peft_dist.kernels.types import LoRALayerWeights

TABLE_HEAD = 2
"""Columns before a slot's pages in its row of a table: its rank, and the bits of its scaling."""


class LayerTables(NamedTuple):
    """One layer on the device."""

    A: torch.Tensor
    B: torch.Tensor
    pages: torch.Tensor
    rank: torch.Tensor
    scaling: torch.Tensor

    @classmethod
    def of(cls, weights: LoRALayerWeights, table: torch.Tensor) -> LayerTables:
        """A layer with int32 ``[slots, TABLE_HEAD + pages]`` of its device."""
        scaling = table.view(torch.float32)[:, 1]
        return cls(weights.A, weights.B, table[:, TABLE_HEAD:], table[:, 0], scaling)

    def of_shrink(self) -> tuple[Any, ...]:
        """Its arguments of ``shrink_kernel``."""
        return self.A, self.pages, self.rank, self.scaling, *self.sizes()

    def of_expand(self) -> tuple[Any, ...]:
        """Its arguments of ``expand_kernel``."""
        return self.B, self.pages, self.rank, *self.sizes()

    def sizes(self) -> tuple[int, int, int]:
        """Distance of two slots in the tables, slots, columns of ``pages``."""
        return self.rank.stride(0), *self.pages.shape


def use_table(weights: LoRALayerWeights, table: torch.Tensor) -> None:
    """Have kernels read int32 ``[slots, TABLE_HEAD + pages]`` of the device of ``weights``, which has to stay there."""
    _, _, weights.pages_t, weights.rank_t, weights.scaling_t = LayerTables.of(weights, table)


def layer_tables(weights: LoRALayerWeights) -> LayerTables:
    """The pool's tables on the device; where it has none, copies of the host's, made once a version."""
    if weights.pages_t is not None and weights.rank_t is not None and weights.scaling_t is not None:
        return LayerTables(weights.A, weights.B, weights.pages_t, weights.rank_t, weights.scaling_t)
    held = weights.scratch.get("triton_tables")
    if held is None or held[0] != weights.version:  # type: ignore[index]
        head = np.stack([weights.rank.astype(np.int32), weights.scaling.astype(np.float32).view(np.int32)], axis=1)
        table = to_device(torch.from_numpy(np.concatenate([head, weights.pages], axis=1)), weights.A.device)
        held = weights.scratch["triton_tables"] = (weights.version, table)
    table = held[1]  # type: ignore[index]
    return LayerTables.of(weights, table)
