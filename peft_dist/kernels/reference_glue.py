"""Plain torch twins of the kernels in ``glue_triton``."""

from __future__ import annotations

import torch
from torch.nn import functional

from peft_dist.kernels.glue import Activation, Norm
from peft_dist.kernels.types import KVCache


def rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Twin of ``glue_triton.rms_norm``."""
    return _normed(x.float(), norm, x.dtype if norm.rounds else None).to(x.dtype)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of ``glue_triton.add_rms_norm``."""
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm(total, norm), total


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Twin of ``glue_triton.gated``."""
    wide = gate.float()
    active = functional.silu(wide) if activation == "silu" else functional.gelu(wide, approximate="tanh")
    return (active * up.float()).to(gate.dtype)


def rotary_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: KVCache,
    slot_mapping: torch.Tensor,
    query_norm: Norm | None = None,
    key_norm: Norm | None = None,
) -> torch.Tensor:
    """Twin of ``glue_triton.rotary_and_write``."""
    block_size = cache.key.shape[1]
    rotated = _rotated(key, cos, sin, key_norm)
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            cache.key[slot // block_size, slot % block_size] = rotated[row].to(cache.key.dtype)
            cache.value[slot // block_size, slot % block_size] = value[row]
    return _rotated(query, cos, sin, query_norm).to(query.dtype)


def _normed(x: torch.Tensor, norm: Norm, rounded: torch.dtype | None = None) -> torch.Tensor:
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
    if rounded is not None:
        x = x.to(rounded).float()
    return x * (norm.weight.float() + float(norm.adds_one))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """float32."""
    wide = x.float() if norm is None else _normed(x.float(), norm)
    width = cos.shape[-1]
    turning, rest = wide[..., :width], wide[..., width:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos.float()[:, None] + torch.cat((-second, first), dim=-1) * sin.float()[:, None]
    return torch.cat((turned, rest), dim=-1)
