"""Random adapters, plans and paged sequences for the kernel tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from peft_dist.kernels import cpu_build
from peft_dist.kernels.kv_pool import KVCachePool
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.kernels.types import AttentionMetadata, KVCache, LoRALayerWeights, LoRAPlan

# Of the largest value: results are rounded once, and sums are taken in another order.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
BACKENDS = ("c", "torch")


def skip_without(backend: str, dtype: torch.dtype) -> None:
    if backend == "c" and cpu_build.library(dtype) is None:
        pytest.skip("no C compiler here")


def assert_close(got: torch.Tensor, expected: torch.Tensor, looser: float = 1.0) -> None:
    """``looser``: factor of the tolerance, where inner sums cancel."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    scale = max(1.0, expected.float().abs().max().item()) if expected.numel() else 1.0
    worst = (got.float() - expected.float()).abs().max().item() if expected.numel() else 0.0
    assert worst <= looser * TOLERANCE[expected.dtype] * scale, f"off by {worst} at scale {scale}"


def layer_of(ranks: Sequence[int], sizes: tuple[int, int], dtype: torch.dtype, seed: int) -> LoRALayerWeights:
    """One layer in which slot s has rank ``ranks[s]``, loaded in a random order with a replacement in between."""
    generator = torch.Generator().manual_seed(seed)
    pool = LoRAPool("cpu", dtype)
    index = pool.add_layer(*sizes)
    spare = pool.add_layer(2, 2)
    order = np.random.default_rng(seed).permutation(len(ranks)).tolist()
    for slot in [*order[:1], *order]:
        adapter = {spare: (torch.ones(1, 2), torch.ones(2, 1), 1.0)}
        if rank := ranks[slot]:
            A, B = (torch.randn(*s, generator=generator) for s in ((rank, sizes[0]), (sizes[1], rank)))
            adapter[index] = (A / sizes[0] ** 0.5, B, 0.25 + slot)
        pool.load(slot, adapter)
    pool.check()
    weights = pool.weights[index]
    assert weights is not None
    return weights


@st.composite
def row_slots(draw: st.DrawFn, num_slots: int, max_rows: int = 80) -> np.ndarray:
    """Slots of rows, -1 and unknown slots among them, as popularity would have them."""
    num_rows = draw(st.integers(1, max_rows))
    kind = draw(st.sampled_from(("identical", "distinct", "uniform", "zipf")))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    if kind == "identical":
        slots = np.full(num_rows, rng.integers(num_slots))
    elif kind == "distinct":
        slots = np.arange(num_rows) % (num_slots + 3) - 1
    elif kind == "uniform":
        slots = rng.integers(-1, num_slots + 2, num_rows)
    else:
        slots = np.minimum(rng.zipf(1.5, num_rows) - 1, num_slots - 1)
    return np.sort(slots) if draw(st.booleans()) else slots


def plan_of(slots: np.ndarray, backend: str | None = None) -> LoRAPlan:
    plan = LoRAPlan.from_rows(np.concatenate([slots, [0]]))
    assert plan is not None
    plan.starts = np.minimum(plan.starts, len(slots))  # from_rows has no plan for rows without any adapter
    plan.backend = backend
    return plan


def metadata(lengths: Sequence[tuple[int, int]], block_size: int, seed: int = 0) -> tuple[AttentionMetadata, int]:
    """Sequences of (query tokens, context) in randomly scattered blocks, and how many blocks there must be."""
    query_lens, contexts = (np.array(column, np.int32) for column in zip(*lengths, strict=True))
    counts = -(-contexts // block_size)
    num_blocks = int(counts.sum()) + 2
    free = np.random.default_rng(seed).permutation(num_blocks).astype(np.int32).tolist()
    tables = np.zeros((len(lengths), int(counts.max())), np.int32)
    slots = []
    for s, (n, context) in enumerate(lengths):
        tables[s, : counts[s]] = [free.pop() for _ in range(counts[s])]
        slots += [int(tables[s, p // block_size]) * block_size + p % block_size for p in range(context - n, context)]
    starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    arrays = (starts, contexts, tables, np.array(slots, np.int64))
    tensors = (torch.from_numpy(a) for a in arrays)
    return AttentionMetadata(*arrays, *tensors, int(query_lens.max()), int(contexts.max())), num_blocks


def cache_of(num_blocks: int, block_size: int, shape: tuple[int, int], dtype: torch.dtype) -> KVCache:
    """A cache whose unwritten slots hold NaN: reading one shows."""
    cache = KVCachePool([shape], num_blocks, block_size, dtype, "cpu").caches[0]
    for tensor in cache:
        tensor.fill_(float("nan"))
    return cache


def fill_context(cache: KVCache, meta: AttentionMetadata, generator: torch.Generator) -> None:
    """Give the tokens of every sequence's context values."""
    block_size = cache.key.shape[1]
    slots = [
        int(meta.block_tables[s, position // block_size]) * block_size + position % block_size
        for s, context in enumerate(meta.context_lens.tolist())
        for position in range(context)
    ]
    for tensor in cache:
        rows = torch.randn(len(slots), *tensor.shape[2:], generator=generator)
        tensor.view(-1, *tensor.shape[2:])[slots] = rows.to(tensor.dtype)
