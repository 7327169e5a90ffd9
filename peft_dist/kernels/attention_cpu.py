"""Attention through the C kernels: one call for a layer, with the batch's addresses prepared once a forward."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
import torch

from peft_dist.kernels import attention_torch, cpu_build
from peft_dist.kernels.attention_interface import AttentionNeeds
from peft_dist.kernels.types import AttentionMetadata, KVCache

_ITEM_TOKENS = 32
"""Query tokens that share one pass over their keys."""
_LONG_CHUNK = 256
"""Half-precision chunks from this length on run in torch, whose matrix units outweigh its overhead there."""


class _MetaStruct(ctypes.Structure):
    _fields_ = (
        ("query_start_loc", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("items", ctypes.c_void_p),
        ("slot_mapping", ctypes.c_void_p),
        ("max_blocks", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("num_items", ctypes.c_int32),
        ("max_item", ctypes.c_int32),
    )


class _LayerStruct(ctypes.Structure):
    _fields_ = (
        ("query", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("block_size", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("key_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class Functions(NamedTuple):
    """Entries of one library."""

    attention: Any
    write_kv: Any


class _Prepared(NamedTuple):
    """``long_chunks`` are the sequences that torch attends to instead of the kernel."""

    address: int
    num_tokens: int
    long_chunks: list[int]
    kept: Any


_functions: dict[torch.dtype, Functions | None] = {}


def functions_for(dtype: torch.dtype) -> Functions | None:
    """The compiled entries for activations of this type, built if need be; None when there are none."""
    if dtype not in _functions:
        library = cpu_build.library(dtype)
        _functions[dtype] = _bind(library) if library else None
    return _functions[dtype]


def _bind(library: ctypes.PyDLL) -> Functions:
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.pd_attention.argtypes = (pointer, pointer, ctypes.c_int)
    library.pd_write_kv.argtypes = (pointer, pointer, size, size, pointer, size, size, ctypes.c_int)
    library.pd_write_kv.restype = None
    return Functions(library.pd_attention, library.pd_write_kv)


def _items(meta: AttentionMetadata, lengths: np.ndarray) -> np.ndarray:
    """(sequence, first token, tokens) of every item, dearest first so that threads end together. int32 ``[n, 3]``.

    ``lengths`` are the query tokens of each sequence that the kernel attends to.
    """
    counts = -(-lengths // _ITEM_TOKENS)
    sequences = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first = number * _ITEM_TOKENS
    tokens = np.minimum(_ITEM_TOKENS, lengths[sequences] - first)
    cost = tokens * (meta.context_lens[sequences] - lengths[sequences] + first + tokens)
    order = np.argsort(-cost, kind="stable")
    return np.ascontiguousarray(np.stack([sequences, first, tokens], axis=1)[order], np.int32)


def _prepare(meta: AttentionMetadata, long_in_torch: bool = False) -> _Prepared:
    key = ("c", long_in_torch)
    prepared = meta.scratch.get(key)
    if prepared is None:
        lengths = np.diff(meta.query_start_loc)
        is_long = (lengths >= _LONG_CHUNK) & long_in_torch
        items = _items(meta, np.where(is_long, 0, lengths))
        arrays = [
            *(np.ascontiguousarray(a, np.int32) for a in (meta.query_start_loc, meta.context_lens, meta.block_tables)),
            items,
            np.ascontiguousarray(meta.slot_mapping, np.int64),
        ]
        num_tokens = int(meta.query_start_loc[-1])
        struct = _MetaStruct(
            *(array.ctypes.data for array in arrays),
            *(meta.block_tables.shape[1], num_tokens, len(items), int(items[:, 2].max(initial=0))),
        )
        long_chunks = np.flatnonzero(is_long).tolist()
        prepared = _Prepared(ctypes.addressof(struct), num_tokens, long_chunks, (struct, arrays))
        meta.scratch[key] = prepared
    return prepared  # type: ignore[return-value]


class CAttention:
    """The C kernels: on CPU, contiguous caches of the activations' own type."""

    name = description = "c"
    graph_capturable = False

    def supports(self, needs: AttentionNeeds) -> str | None:
        """Why a layer cannot run here, or None."""
        if needs.device.type != "cpu":
            return f"it runs on CPU, not on {needs.device.type}"
        if needs.dtype != needs.cache_dtype:
            return f"{needs.dtype} activations with a {needs.cache_dtype} cache"
        if not needs.contiguous:
            return "a cache that is not contiguous"
        if functions_for(needs.dtype) is None:
            return f"no compiled library for {needs.dtype}"
        return None

    def write_kv(self, key: torch.Tensor, value: torch.Tensor, cache: KVCache, meta: AttentionMetadata) -> None:
        """As ``attention.write_kv``."""
        write_kv(_library(key.dtype), key, value, cache, meta)

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
        return paged_attention(_library(query.dtype), query, cache, meta, **options)  # type: ignore[arg-type]


def _library(dtype: torch.dtype) -> Functions:
    functions = functions_for(dtype)
    assert functions is not None, "supports() was asked before"
    return functions


def write_kv(
    functions: Functions, key: torch.Tensor, value: torch.Tensor, cache: KVCache, meta: AttentionMetadata
) -> None:
    """C back end of ``attention.write_kv``."""
    batch = _prepare(meta)
    for new, stored in ((key, cache.key), (value, cache.value)):
        if new.shape != (batch.num_tokens, *stored.shape[2:]):
            raise ValueError(f"{list(new.shape)} keys or values do not fit {batch.num_tokens} tokens of {stored.shape}")
        new = new if new.stride(2) == 1 else new.contiguous()
        size = new.element_size()
        functions.write_kv(
            *(batch.address, new.data_ptr(), new.stride(0) * size, new.stride(1) * size, stored.data_ptr()),
            *(stored.shape[2], stored.shape[3] * size, torch.get_num_threads()),
        )


def paged_attention(
    functions: Functions,
    query: torch.Tensor,
    cache: KVCache,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """C back end of ``attention.paged_attention``."""
    plain = softcap is None and sinks is None and sliding_window is None
    batch = _prepare(meta, long_in_torch=plain and query.dtype != torch.float32)
    query = query if query.stride(2) == 1 else query.contiguous()
    num_heads = query.shape[1]
    block_size, num_kv_heads, key_dim = cache.key.shape[1:]
    if query.shape[0] != batch.num_tokens or query.shape[2] != key_dim or num_heads % num_kv_heads:
        raise ValueError(f"query {list(query.shape)} does not fit {batch.num_tokens} tokens of {list(cache.key.shape)}")
    out = query.new_empty(batch.num_tokens, num_heads, cache.value.shape[3])
    sinks = None if sinks is None else sinks.detach().to(torch.float32).contiguous()
    layer = _LayerStruct(
        *(query.data_ptr(), out.data_ptr(), query.stride(0), query.stride(1)),
        *(cache.key.data_ptr(), cache.value.data_ptr(), None if sinks is None else sinks.data_ptr()),
        *(block_size, num_heads, num_kv_heads, key_dim, cache.value.shape[3], sliding_window or 0),
        *(scale, softcap or 0.0),
    )
    if functions.attention(batch.address, ctypes.addressof(layer), torch.get_num_threads()):
        raise MemoryError("no memory for the buffers of attention")
    for sequence in batch.long_chunks:
        attention_torch.attend_chunk(out, query, cache, meta, sequence, scale)
    return out
