"""Paged attention in torch; runs on any device. Decodes share one padded call, longer chunks run one by one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from peft_dist.kernels import reference
from peft_dist.kernels.attention_interface import AttentionNeeds
from peft_dist.kernels.types import AttentionMetadata, KVCache


class TorchAttention:
    """Takes everything, on any device; reads the metadata's host arrays, so that no graph can hold it."""

    name = description = "torch"
    graph_capturable = False

    def supports(self, needs: AttentionNeeds) -> str | None:
        """None: it takes every layer."""
        return None

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, cache: KVCache, meta: AttentionMetadata) -> None:
        """As ``attention.write_kv``."""
        write_kv(key, value, cache, meta)

    def paged_attention(
        self,
        query: torch.Tensor,
        cache: KVCache,
        meta: AttentionMetadata,
        *,
        scale: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """As ``attention.paged_attention``."""
        options = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap, "sinks": sinks}
        return paged_attention(query, cache, meta, **options)  # type: ignore[arg-type]


class _Decodes(NamedTuple):
    """The sequences with one query token. ``hidden`` is bool ``[N, 1, 1, L]``: keys that lie out of sight."""

    rows: torch.Tensor
    blocks: torch.Tensor
    hidden: torch.Tensor


def write_kv(key: torch.Tensor, value: torch.Tensor, cache: KVCache, meta: AttentionMetadata) -> None:
    """Torch back end of ``attention.write_kv``."""
    cache.key.flatten(0, 1).index_copy_(0, meta.slot_mapping_t, key)
    cache.value.flatten(0, 1).index_copy_(0, meta.slot_mapping_t, value)


def _hidden(positions: torch.Tensor, length: int, sliding_window: int | None) -> torch.Tensor:
    """True where key k is not seen from position p: ``[*positions.shape, length]``."""
    keys = torch.arange(length, device=positions.device)
    hidden = keys > positions[..., None]
    if sliding_window is not None:
        hidden |= keys <= positions[..., None] - sliding_window
    return hidden


def _decodes(meta: AttentionMetadata, block_size: int, sliding_window: int | None) -> _Decodes | None:
    key = ("torch_decodes", block_size, sliding_window)
    if key not in meta.scratch:
        meta.scratch[key] = _make_decodes(meta, block_size, sliding_window)
    return meta.scratch[key]  # type: ignore[return-value]


def _make_decodes(meta: AttentionMetadata, block_size: int, sliding_window: int | None) -> _Decodes | None:
    sequences = np.flatnonzero(np.diff(meta.query_start_loc) == 1)
    if not len(sequences):
        return None
    device = meta.block_tables_t.device
    num_blocks = -(-int(meta.context_lens[sequences].max()) // block_size)
    positions = torch.from_numpy(meta.context_lens[sequences].astype(np.int64) - 1).to(device)
    return _Decodes(
        rows=torch.from_numpy(meta.query_start_loc[sequences].astype(np.int64)).to(device),
        blocks=torch.from_numpy(meta.block_tables[sequences, :num_blocks].astype(np.int64)).to(device),
        hidden=_hidden(positions, num_blocks * block_size, sliding_window)[:, None, None],
    )


def _softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """query ``[N, Hq, n, D]``, key and value ``[N, Hkv, L, D]``, hidden broadcastable to ``[N, Hq, n, L]``."""
    if softcap is None and sinks is None:
        group = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=~hidden, scale=scale, enable_gqa=group)
    group_size = query.shape[1] // key.shape[1]
    key, value = (t.float().repeat_interleave(group_size, dim=1) for t in (key, value))
    scores = query.float() @ key.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
        return (torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1] @ value).to(query.dtype)
    return (scores.softmax(dim=-1) @ value).to(query.dtype)


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
    """Torch back end of ``attention.paged_attention``."""
    out = query.new_empty(*query.shape[:2], cache.value.shape[-1])
    block_size = cache.key.shape[1]
    if decodes := _decodes(meta, block_size, sliding_window):
        # Blocks may hold non-finite leftovers behind a sequence's end; neither masks nor weights of 0 undo those.
        unseen = decodes.hidden[:, 0, 0, :, None, None]
        keys, values = (t[decodes.blocks].flatten(1, 2).masked_fill(unseen, 0.0) for t in cache)
        q = query[decodes.rows][:, :, None]
        result = _softmax_attention(
            q, keys.transpose(1, 2), values.transpose(1, 2), decodes.hidden, scale, softcap, sinks
        )
        out[decodes.rows] = result[:, :, 0]
    for sequence in np.flatnonzero(np.diff(meta.query_start_loc) > 1).tolist():
        attend_chunk(out, query, cache, meta, sequence, scale, sliding_window, softcap, sinks)
    return out


def attend_chunk(
    out: torch.Tensor,
    query: torch.Tensor,
    cache: KVCache,
    meta: AttentionMetadata,
    sequence: int,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of one sequence's query tokens, written to their rows of ``out``."""
    first, last = int(meta.query_start_loc[sequence]), int(meta.query_start_loc[sequence + 1])
    keys, values = (reference.gather(t, meta, sequence).transpose(0, 1)[None] for t in cache)
    length, q = keys.shape[2], query[first:last].transpose(0, 1)[None]
    windowed = sliding_window is not None and sliding_window < length
    if last - first == length and not windowed and softcap is None and sinks is None:
        grouped = q.shape[1] != keys.shape[1]
        result = F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
    else:
        positions = torch.arange(length - (last - first), length, device=query.device)
        hidden = _hidden(positions, length, sliding_window)
        result = _softmax_attention(q, keys, values, hidden, scale, softcap, sinks)
    out[first:last] = result[0].transpose(0, 1)
