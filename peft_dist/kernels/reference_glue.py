"""Plain torch twins of the kernels in ``glue_triton``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from peft_dist.kernels.glue import Activation, Norm
from peft_dist.kernels.types import KVCache


def rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Twin of ``glue_triton.rms_norm``."""
    return _normed(x.float(), norm, x.dtype if norm.rounds else None).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, norm: Norm, part: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of ``glue_triton.add_rms_norm``."""
    total = (_whole(x, part) + residual.float()).to(x.dtype)
    return rms_norm(total, norm), total


def gated(
    gate: torch.Tensor, up: torch.Tensor, activation: Activation, parts: Sequence[torch.Tensor] | None = None
) -> torch.Tensor:
    """Twin of ``glue_triton.gated``."""
    of_gate, of_up = parts or (None, None)
    wide = _whole(gate, of_gate)
    active = functional.silu(wide) if activation == "silu" else functional.gelu(wide, approximate="tanh")
    return (active * _whole(up, of_up)).to(gate.dtype)


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
    parts: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Twin of ``glue_triton.rotary_and_write``."""
    block_size, dtype = cache.key.shape[1], query.dtype
    if parts is not None:
        query, key, value = (_whole(x, part) for x, part in zip((query, key, value), parts, strict=True))
    rotated = _rotated(key, cos, sin, key_norm)
    for row, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            cache.key[slot // block_size, slot % block_size] = rotated[row].to(cache.key.dtype)
            cache.value[slot // block_size, slot % block_size] = value[row]
    return _rotated(query, cos, sin, query_norm).to(dtype)


def _whole(x: torch.Tensor, part: torch.Tensor | None) -> torch.Tensor:
    """float32."""
    return x.float() if part is None else x.float() + part.float()


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
