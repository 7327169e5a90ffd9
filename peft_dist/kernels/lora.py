"""Add the adapters' part to a layer's output, for rows of many adapters in one call. For inference only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_dist.kernels import lora_cpu, lora_torch
from peft_dist.kernels.backend import has_triton
from peft_dist.kernels.lora_beside import ShrinkBeside
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan

# What is not captured has more rows, unless nothing is.
_MANY_ROWS = 1024


def add_lora_(y: torch.Tensor, x: torch.Tensor, weights: LoRALayerWeights, plan: LoRAPlan) -> torch.Tensor:
    """In place, for each run of rows with slot s: ``y += (x @ A_s.T * scaling_s * plan.factor) @ B_s``.

    Rows of the base (slot -1), and of slots that do not adapt this layer, are left as they are. The rank
    intermediate and all sums are float32; each element of y is rounded once.

    Args:
        y: ``[R, out_features]``, float32, bfloat16 or float16, unit stride in the last dimension.
        x: ``[R, in_features]``, same kinds; its dtype may differ from that of the adapters.
        weights: The layer's resident adapters.
        plan: The runs; covers R rows.

    Returns:
        y itself.
    """
    add_lora_group_([y], x, [weights], plan)
    return y


def add_lora_group_(
    ys: Sequence[torch.Tensor], x: torch.Tensor, weights: Sequence[LoRALayerWeights | None], plan: LoRAPlan
) -> None:
    """``add_lora_`` for up to eight layers that read the same x (q/k/v, gate/up), in one call where the back end can.

    Args:
        ys: ``[..., out_features_i]`` of each layer, R rows, which may be columns of one wider tensor.
        x: ``[..., in_features]``, R rows.
        weights: Of each layer; None leaves its y as it is.
    """
    resident = [w for w in weights if w is not None]
    if not resident:
        return
    if len(resident) < len(weights):
        ys = [y for y, w in zip(ys, weights, strict=True) if w is not None]
    backend = _backend_of(plan, x)
    if backend == "c" and lora_cpu.add_lora_group_(ys, x, resident, plan):
        return
    if backend == "triton":
        from peft_dist.kernels import lora_triton

        if lora_triton.add_lora_group_(ys, x, resident, plan):
            return
    rows = x.reshape(-1, x.shape[-1])
    for y, w in zip(ys, resident, strict=True):
        # Leading dimensions of a y that is part of a wider tensor fold without a copy, or view says that they do not.
        lora_torch.add_lora_(y.view(-1, y.shape[-1]), rows, w, plan)


def begin_lora(x: torch.Tensor, weights: Sequence[LoRALayerWeights | None], plan: LoRAPlan) -> ShrinkBeside | None:
    """Start ``add_lora_group_`` before the layers' own outputs are there, on a GPU: while a step is captured, or of so
    many rows that the device takes longer than the host for the launches.

    x has to stay as it is until the work is ended.

    Returns:
        What ``finish_(ys)`` ends the work of; None: nothing was begun, and ``add_lora_group_`` does it all.
    """
    if not x.is_cuda or _backend_of(plan, x) != "triton":
        return None
    if plan.num_rows < _MANY_ROWS and not torch.cuda.is_current_stream_capturing():
        return None
    return ShrinkBeside.begin(x, weights, plan)


def has_gate(x: torch.Tensor, weights: Sequence[LoRALayerWeights | None], plan: LoRAPlan) -> bool:
    """Whether ``lora_gate`` takes two layers that read x: by Triton, in one launch, with tiles of all rows."""
    resident = [w for w in weights if w is not None]
    if len(weights) != 2 or not resident or (plan.tiles is not None and not plan.tiles.has_base):
        return False
    if _backend_of(plan, x) != "triton":
        return False
    from peft_dist.kernels import lora_triton

    return lora_triton.is_one_launch(x, resident)


def lora_gate(
    gate: torch.Tensor,
    up: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[LoRALayerWeights | None],
    plan: LoRAPlan,
    activation: str,
    begun: ShrinkBeside | None = None,
) -> torch.Tensor:
    """``add_lora_group_`` to the outputs of a gated MLP's two layers, and ``activation(gate) * up`` in the same pass.

    Args:
        gate, up: ``[..., N]``, R rows; left as they are.
        x: ``[..., in_features]``, R rows, in which ``has_gate`` holds.
        activation: "silu" or "gelu_tanh".
        begun: What ``begin_lora`` gave for these.

    Returns:
        ``[..., N]``, contiguous, each element rounded once. Rows in no tile (padding) hold anything.
    """
    if begun is not None:
        return begun.gate(gate, up, activation)
    from peft_dist.kernels import lora_gate_triton, lora_triton

    lora_triton.lora_shrink_group(x, weights, plan)
    return lora_gate_triton.lora_expand_gate(gate, up, weights, plan, activation, is_next=True)


def _backend_of(plan: LoRAPlan, x: torch.Tensor) -> str:
    if plan.backend is not None:
        return plan.backend
    return "triton" if x.is_cuda and has_triton() else "c"


def add_embedding_lora_(
    y: torch.Tensor, ids: torch.Tensor, weights: LoRALayerWeights, plan: LoRAPlan, embed_scale: float | None = None
) -> torch.Tensor:
    """The same for an embedding: the rank intermediate of a row is column ``ids[row]`` of A.

    Args:
        y: ``[R, embedding_dim]``.
        ids: int64 ``[R]``, token ids.
        embed_scale: Factor of models that scale their embeddings (Gemma); applied to the adapter's part.

    Returns:
        y itself.
    """
    factor = 1.0 if embed_scale is None else embed_scale
    backend = _backend_of(plan, y)
    if backend == "c" and lora_cpu.add_embedding_lora_(y, ids, weights, plan, factor):
        return y
    if backend == "triton":
        from peft_dist.kernels import lora_embedding_triton

        if lora_embedding_triton.add_embedding_lora_(y, ids, weights, plan, factor):
            return y
    return lora_torch.add_embedding_lora_(y, ids, weights, plan, embed_scale)
