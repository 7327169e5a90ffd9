"""Causal attention over paged keys and values, prefill chunks and decodes of many sequences in one call."""

from __future__ import annotations

import torch

from peft_dist.kernels import attention_backends
from peft_dist.kernels.attention_interface import AttentionBackend, AttentionNeeds
from peft_dist.kernels.types import AttentionMetadata, KVCache


def write_kv(key: torch.Tensor, value: torch.Tensor, cache: KVCache, meta: AttentionMetadata) -> None:
    """Store this step's keys and values (each ``[T, num_kv_heads, head_dim]``) at ``meta.slot_mapping``.

    On a GPU a slot of -1 stands for a padded row and is skipped.
    """
    _backend(key, cache, meta).write_kv(key, value, cache, meta)


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
        ``[T, num_heads, head_dim of the values]`` in the query's dtype; anything in the rows of sequences without
        context, which only a padded batch has.
    """
    backend = _backend(query, cache, meta, sliding_window is not None, softcap is not None, sinks)
    return backend.paged_attention(
        query, cache, meta, scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks
    )


def _backend(
    tensor: torch.Tensor,
    cache: KVCache,
    meta: AttentionMetadata,
    window: bool = False,
    softcap: bool = False,
    sinks: torch.Tensor | None = None,
) -> AttentionBackend:
    """What runs a call whose queries, or keys, are ``tensor``."""
    _, block_size, num_kv_heads, head_dim = cache.key.shape
    needs = AttentionNeeds(
        tensor.device,
        tensor.dtype,
        cache.key.dtype,
        tensor.shape[1],
        num_kv_heads,
        head_dim,
        cache.value.shape[3],
        block_size,
        window,
        softcap,
        None if sinks is None else sinks.dtype,
        cache.key.is_contiguous() and cache.value.is_contiguous(),
    )
    backend = attention_backends.resolve(meta.backend, needs)
    if not backend.graph_capturable and tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"attention back end {backend.name!r} reads host memory and cannot be part of a CUDA graph: "
            f"run this model without graphs, or with a back end that takes all of its layers ({needs})"
        )
    return backend
