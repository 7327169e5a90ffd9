"""Causal attention over paged keys and values, prefill chunks and decodes of many sequences in one call."""

from __future__ import annotations

import torch

from peft_dist.kernels import attention_cpu, attention_torch
from peft_dist.kernels.types import AttentionMetadata, KVCache


def write_kv(key: torch.Tensor, value: torch.Tensor, cache: KVCache, meta: AttentionMetadata) -> None:
    """Store this step's keys and values (each ``[T, num_kv_heads, head_dim]``) at ``meta.slot_mapping``."""
    functions = _c_functions(key, cache, meta)
    if functions is None:
        attention_torch.write_kv(key, value, cache, meta)
    else:
        attention_cpu.write_kv(functions, key, value, cache, meta)


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
    """Attention of every query token over its own sequence, up to its own position.

    Args:
        query: ``[T, num_heads, head_dim]``; num_heads is a multiple of the cache's num_kv_heads.
        cache: The layer's paged keys and values; this step's were written before (``write_kv``).
        meta: Where the sequences stand.
        scale: Factor of the scores.
        sliding_window: A query at position p sees keys after ``p - sliding_window`` only.
        softcap: Scores become ``tanh(score / softcap) * softcap`` before masking.
        sinks: ``[num_heads]``, a score per head that takes part in the softmax and brings no value.

    Returns:
        ``[T, num_heads, head_dim of the values]`` in the query's dtype.
    """
    functions = _c_functions(query, cache, meta)
    if functions is None:
        return attention_torch.paged_attention(
            query, cache, meta, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
        )
    return attention_cpu.paged_attention(
        functions, query, cache, meta, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
    )


def _c_functions(tensor: torch.Tensor, cache: KVCache, meta: AttentionMetadata) -> attention_cpu.Functions | None:
    """The C kernels for this call, or None when torch has to run it."""
    if meta.backend == "torch" or not attention_cpu.takes(tensor, cache):
        return None
    return attention_cpu.functions_for(tensor.dtype)
