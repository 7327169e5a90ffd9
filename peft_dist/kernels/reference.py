"""Plain torch twins of every kernel: slow, obvious, and the oracle of the tests. Nothing is cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from peft_dist.kernels.types import AttentionMetadata, KVCache, LoRALayerWeights, LoRAPlan


def _adapted_runs(weights: LoRALayerWeights, plan: LoRAPlan) -> Iterator[tuple[slice, torch.Tensor, float]]:
    """(rows of the input, rows of A and B, scaling) of every run whose slot adapts this layer."""
    for i, slot in enumerate(plan.slots.tolist()):
        if 0 <= slot < len(weights.rank) and weights.rank[slot] > 0:
            pool_rows = torch.from_numpy(weights.rows_of(slot)).to(weights.A.device)
            scaling = float(weights.scaling[slot]) * plan.factor
            yield slice(int(plan.starts[i]), int(plan.starts[i + 1])), pool_rows, scaling


def add_lora_(y: torch.Tensor, x: torch.Tensor, weights: LoRALayerWeights, plan: LoRAPlan) -> torch.Tensor:
    """Twin of ``lora.add_lora_``."""
    for rows, pool_rows, scaling in _adapted_runs(weights, plan):
        t = x[rows].float() @ weights.A[pool_rows].float().T
        y[rows] = (y[rows].float() + t * scaling @ weights.B[pool_rows].float()).to(y.dtype)
    return y


def add_embedding_lora_(
    y: torch.Tensor, ids: torch.Tensor, weights: LoRALayerWeights, plan: LoRAPlan, embed_scale: float | None = None
) -> torch.Tensor:
    """Twin of ``lora.add_embedding_lora_``."""
    for rows, pool_rows, scaling in _adapted_runs(weights, plan):
        t = weights.A[pool_rows][:, ids[rows]].float().T
        factor = scaling if embed_scale is None else scaling * embed_scale
        y[rows] = (y[rows].float() + t * factor @ weights.B[pool_rows].float()).to(y.dtype)
    return y


def lora_gate(
    gate: torch.Tensor,
    up: torch.Tensor,
    x: torch.Tensor,
    weights: Sequence[LoRALayerWeights | None],
    plan: LoRAPlan,
    activation: str = "silu",
) -> torch.Tensor:
    """Twin of ``lora_shrink_group`` and ``lora_expand_gate``, for all rows."""
    wide = [gate.float().clone(), up.float().clone()]
    for y, w in zip(wide, weights, strict=True):
        if w is not None:
            add_lora_(y, x.float(), w, plan)
    functional = torch.nn.functional
    active = functional.silu(wide[0]) if activation == "silu" else functional.gelu(wide[0], approximate="tanh")
    return (active * wide[1]).to(gate.dtype)


def merge_into_(
    out: torch.Tensor, base: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Twin of ``merge.merge_into_``."""
    return out.copy_(base.float() + scaling * (B.float() @ A.float()))


def write_kv(key: torch.Tensor, value: torch.Tensor, cache: KVCache, meta: AttentionMetadata) -> None:
    """Twin of ``attention.write_kv``."""
    block_size = cache.key.shape[1]
    for row, slot in enumerate(meta.slot_mapping.tolist()):
        cache.key[slot // block_size, slot % block_size] = key[row]
        cache.value[slot // block_size, slot % block_size] = value[row]


def gather(cache: torch.Tensor, meta: AttentionMetadata, sequence: int) -> torch.Tensor:
    """All keys (or values) of a sequence, ``[context_len, num_kv_heads, head_dim]``."""
    length = int(meta.context_lens[sequence])
    num_blocks = -(-length // cache.shape[1])
    blocks = torch.as_tensor(meta.block_tables[sequence, :num_blocks], dtype=torch.long, device=cache.device)
    return cache[blocks].flatten(0, 1)[:length]


def paged_attention(
    query: torch.Tensor,
    cache: KVCache,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Twin of ``attention.paged_attention``."""
    out = query.new_empty(*query.shape[:2], cache.value.shape[-1])
    group = query.shape[1] // cache.key.shape[2]
    for s in range(meta.num_seqs):
        rows = slice(int(meta.query_start_loc[s]), int(meta.query_start_loc[s + 1]))
        key = gather(cache.key, meta, s).float().repeat_interleave(group, dim=1)
        value = gather(cache.value, meta, s).float().repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query[rows].float(), key) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        num_queries, length = scores.shape[1:]
        positions = torch.arange(length - num_queries, length, device=query.device)[:, None]
        keys = torch.arange(length, device=query.device)[None]
        hidden = keys > positions
        if sliding_window is not None:
            hidden |= keys <= positions - sliding_window
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            sink_column = sinks.float()[:, None, None].expand(-1, num_queries, 1)
            probabilities = torch.cat([scores, sink_column], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            probabilities = scores.softmax(dim=-1)
        out[rows] = torch.einsum("hqk,khd->qhd", probabilities, value).to(out.dtype)
    return out
