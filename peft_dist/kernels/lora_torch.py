"""LoRA in torch without a loop over adapters; runs on any device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from peft_dist.kernels import reference
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan


class _Selection(NamedTuple):
    """What a plan and a rank layout together determine.

    Attributes:
        rows: int64 ``[R']``, input rows whose slot adapts the layer; None when all do.
        pool_rows: int64 ``[K]``, rows of A and B that some input row needs; None when all are needed.
        factor: float32 ``[R', K]``, the scaling where the pool row belongs to the input row's slot.
        mask: bool ``[R', K]``, where it belongs.
    """

    rows: torch.Tensor | None
    pool_rows: torch.Tensor | None
    factor: torch.Tensor
    mask: torch.Tensor


def _layout_key(weights: LoRALayerWeights) -> bytes:
    """Equal for layers in which every slot has the same rows and scaling, so that they share a selection."""
    cached = weights.scratch.get("torch_layout")
    if cached is None or cached[0] != weights.version:  # type: ignore[index]
        owned = weights.rows_of(np.flatnonzero(weights.rank))
        parts = (owned, weights.rank, weights.scaling, np.array(weights.A.shape[:1]))
        cached = (weights.version, b"|".join(part.tobytes() for part in parts) + str(weights.A.device).encode())
        weights.scratch["torch_layout"] = cached
    return cached[1]  # type: ignore[index,no-any-return]


def _select(weights: LoRALayerWeights, plan: LoRAPlan) -> _Selection | None:
    key = ("torch_selection", _layout_key(weights))
    if key not in plan.scratch:
        plan.scratch[key] = _make_selection(weights, plan)
    return plan.scratch[key]  # type: ignore[return-value]


def _make_selection(weights: LoRALayerWeights, plan: LoRAPlan) -> _Selection | None:
    """None when no row's slot adapts this layer."""
    device = weights.A.device
    row_slots = np.repeat(plan.slots, np.diff(plan.starts))
    ranks = np.where((row_slots >= 0) & (row_slots < len(weights.rank)), 0, -1)
    ranks[ranks == 0] = weights.rank[row_slots[ranks == 0]]
    rows = np.flatnonzero(ranks > 0)
    if not len(rows):
        return None
    slots = np.unique(row_slots[rows])
    pool_rows = weights.rows_of(slots)
    owners = np.repeat(slots, weights.rank[slots])
    mask = row_slots[rows][:, None] == owners[None, :]
    factor = np.where(mask, weights.scaling[owners][None, :] * plan.factor, 0.0).astype(np.float32)
    all_pool_rows = np.array_equal(pool_rows, np.arange(weights.A.shape[0]))
    return _Selection(
        rows=None if len(rows) == plan.num_rows else torch.from_numpy(rows).to(device),
        pool_rows=None if all_pool_rows else torch.from_numpy(pool_rows).to(device),
        factor=torch.from_numpy(factor).to(device),
        mask=torch.from_numpy(mask).to(device),
    )


def _is_finite(weights: LoRALayerWeights) -> bool:
    """Whether every adapter's B may be multiplied by zeros: 0 times Inf would reach rows of other adapters."""
    cached = weights.scratch.get("torch_finite")
    if cached is None or cached[0] != weights.version:  # type: ignore[index]
        doubtful = weights.rows_of(np.flatnonzero((weights.rank > 0) & ~weights.finite))
        finite = not len(doubtful) or bool(
            torch.isfinite(weights.B[torch.from_numpy(doubtful).to(weights.B.device)]).all()
        )
        cached = (weights.version, finite)
        weights.scratch["torch_finite"] = cached
    return cached[1]  # type: ignore[index,no-any-return]


def _take(table: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return table if index is None else table.index_select(0, index)


def _expand_(y: torch.Tensor, t: torch.Tensor, weights: LoRALayerWeights, chosen: _Selection) -> torch.Tensor:
    """Add ``t @ B`` (float32 ``[R', K]`` by ``[K, out]``) to the chosen rows of y."""
    delta = t @ _take(weights.B, chosen.pool_rows).float()
    if chosen.rows is None:
        return y.add_(delta) if y.dtype == torch.float32 else y.copy_(y.float().add_(delta))
    delta += y.index_select(0, chosen.rows)
    return y.index_copy_(0, chosen.rows, delta.to(y.dtype))


def add_lora_(y: torch.Tensor, x: torch.Tensor, weights: LoRALayerWeights, plan: LoRAPlan) -> torch.Tensor:
    """Torch back end of ``lora.add_lora_``."""
    chosen = _select(weights, plan)
    if chosen is None:
        return y
    if not _is_finite(weights):
        return reference.add_lora_(y, x, weights, plan)
    t = _take(x, chosen.rows).float() @ _take(weights.A, chosen.pool_rows).float().T
    t = torch.where(chosen.mask, t * chosen.factor, 0.0)
    return _expand_(y, t, weights, chosen)


def add_embedding_lora_(
    y: torch.Tensor, ids: torch.Tensor, weights: LoRALayerWeights, plan: LoRAPlan, embed_scale: float | None = None
) -> torch.Tensor:
    """Torch back end of ``lora.add_embedding_lora_``."""
    chosen = _select(weights, plan)
    if chosen is None:
        return y
    if not _is_finite(weights):
        return reference.add_embedding_lora_(y, ids, weights, plan, embed_scale)
    columns = _take(ids, chosen.rows).long()
    if chosen.pool_rows is None:
        t = weights.A.index_select(1, columns).float().T
    else:
        t = weights.A[chosen.pool_rows[None, :], columns[:, None]].float()
    factor = chosen.factor if embed_scale is None else chosen.factor * embed_scale
    return _expand_(y, torch.where(chosen.mask, t * factor, 0.0), weights, chosen)
