"""Cases for kernels that run in Triton's interpreter on a CPU and for real on a GPU, with the same test bodies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from peft_dist.kernels import reference
from peft_dist.kernels.attention_interface import AttentionBackend
from peft_dist.kernels.types import AttentionMetadata, KVCache
from tests.kernels.cases import cache_of, fill_context, metadata

DEVICES = (
    pytest.param(
        "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")
    ),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
)


def on_device(meta: AttentionMetadata, device: str) -> AttentionMetadata:
    """The same batch, its tensors on the device; nothing derived from it yet."""
    names = ("query_start_loc_t", "context_lens_t", "block_tables_t", "slot_mapping_t")
    return dataclasses.replace(meta, scratch={}, **{name: getattr(meta, name).to(device) for name in names})


def interleaved(cache: KVCache) -> KVCache:
    """The same contents as two views of one tensor in which each block's keys and values are neighbours."""
    assert cache.key.shape == cache.value.shape
    return KVCache(*torch.stack(list(cache), dim=1).unbind(1))


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is taken without a value holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def batch(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int, int, int],
    block_size: int,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
) -> tuple[torch.Tensor, KVCache, AttentionMetadata]:
    """(queries, cache, metadata); heads are (of queries, of keys, key size, value size)."""
    num_heads, num_kv_heads, key_dim, value_dim = heads
    generator = torch.Generator().manual_seed(seed)
    meta, num_blocks = metadata(lengths, block_size, seed)
    cache = KVCache(*(cache_of(num_blocks, block_size, (num_kv_heads, d), dtype).key for d in (key_dim, value_dim)))
    fill_context(cache, meta, generator)
    cache = KVCache(*(tensor.to(device) for tensor in cache))
    query = torch.randn(num_heads, len(meta.slot_mapping), key_dim, generator=generator).to(device, dtype)
    cache = interleaved(cache) if key_dim == value_dim else cache
    return query.transpose(0, 1), cache, on_device(meta, device)


def attend(
    backend: AttentionBackend, query: torch.Tensor, cache: KVCache, meta: AttentionMetadata, **options: object
) -> torch.Tensor:
    given_options = {"scale": 0.3, "sliding_window": None, "softcap": None, "sinks": None} | options
    with poisoned():
        return backend.paged_attention(query, cache, meta, **given_options)  # type: ignore[arg-type]


def expected(query: torch.Tensor, cache: KVCache, meta: AttentionMetadata, **options: object) -> torch.Tensor:
    """In float32."""
    wide = KVCache(*(tensor.float() for tensor in cache))
    return reference.paged_attention(query.float(), wide, meta, **({"scale": 0.3} | options))  # type: ignore[arg-type]


def assert_accurate(got: torch.Tensor, exact: torch.Tensor) -> None:
    """Off by at most 2e-3 (float32: 1e-5) of the whole beyond what rounding the exact result costs."""
    # Triton's interpreter cuts bfloat16 off where a GPU rounds: twice the error, in the weights and in the result.
    half = 2e-3 if got.is_cuda else 6e-3
    allowed = 1e-5 if got.dtype == torch.float32 else half
    assert got.shape == exact.shape and got.isfinite().all()
    rounding = (exact.to(got.dtype).float() - exact).norm()
    assert (got.float() - exact).norm() <= allowed * exact.norm() + rounding


def padded_batch(meta: AttentionMetadata, rows: int, tokens: int, max_context: int = 512) -> AttentionMetadata:
    """The batch as a captured step for this size has it. Its host arrays are of no batch.

    Padded sequences have no context; where every sequence has one token they have one too, else none.
    """
    device, count = meta.context_lens_t.device, meta.num_seqs
    decodes = tokens == rows
    columns = max(64, meta.block_tables_t.shape[1])
    starts = torch.full((rows + 1,), len(meta.slot_mapping_t), dtype=torch.int32, device=device)
    starts[: count + 1] = meta.query_start_loc_t
    if decodes:
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
    contexts = torch.zeros(rows, dtype=torch.int32, device=device)
    contexts[:count] = meta.context_lens_t
    tables = torch.zeros(rows, columns, dtype=torch.int32, device=device)
    tables[:count, : meta.block_tables_t.shape[1]] = meta.block_tables_t
    slots = torch.full((tokens,), -1, dtype=torch.int64, device=device)
    slots[: len(meta.slot_mapping_t)] = meta.slot_mapping_t
    nobody = (np.zeros(rows + 1, np.int32), np.zeros(rows, np.int32), np.zeros((rows, 1), np.int32))
    return AttentionMetadata(
        *nobody, np.full(tokens, -1), starts, contexts, tables, slots, 1 if decodes else tokens, max_context
    )
