"""The Triton kernel that writes keys and values, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from peft_dist.kernels import reference
from peft_dist.kernels.types import AttentionMetadata, KVCache
from tests.kernels.cases import metadata
from tests.kernels.device_cases import DEVICES, interleaved, on_device

kv_write_triton = pytest.importorskip("peft_dist.kernels.kv_write_triton")

HEADS = 3


def empty_cache(num_blocks: int, block_size: int, dims: tuple[int, int], dtype: torch.dtype, device: str) -> KVCache:
    shapes = [(num_blocks, block_size, HEADS, dim) for dim in dims]
    cache = KVCache(*(torch.full(shape, float("nan"), dtype=dtype, device=device) for shape in shapes))
    return interleaved(cache) if dims[0] == dims[1] else cache


def joined(tokens: int, dims: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as parts of one wider row, as a joined projection hands them over."""
    rows = torch.randn(tokens, HEADS * sum(dims) + 5).to(device, dtype)
    key, value, _ = rows.split([HEADS * dims[0], HEADS * dims[1], 5], dim=1)
    return key.unflatten(1, (HEADS, dims[0])), value.unflatten(1, (HEADS, dims[1]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dims", "block_size"), [((16, 16), 16), ((80, 80), 3), ((33, 33), 8), ((24, 8), 16)])
def test_rows_reach_their_slots_and_nothing_else_changes(
    device: str, dtype: torch.dtype, dims: tuple[int, int], block_size: int
) -> None:
    meta, num_blocks = metadata([(1, 30), (5, 7), (1, 1), (3, 3)], block_size)
    cache = empty_cache(num_blocks, block_size, dims, dtype, device)
    twin = KVCache(*(t.clone() for t in cache))
    key, value = joined(len(meta.slot_mapping), dims, dtype, device)
    # Odd rows are padding, as a captured batch has it.
    kept = torch.arange(len(meta.slot_mapping)) % 2 == 0
    reference.write_kv(key[kept], value[kept], twin, masked(meta, kept.nonzero().flatten()))
    meta.slot_mapping_t[~kept] = -1
    kv_write_triton.write_kv(key, value, cache, on_device(meta, device))
    for got, expected in zip(cache, twin, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        assert got.isfinite().any()


def masked(meta: AttentionMetadata, rows: torch.Tensor) -> AttentionMetadata:
    """A batch of which the twin writes these rows alone."""
    kept = meta.slot_mapping_t[rows].clone()
    arrays = (meta.query_start_loc, meta.context_lens, meta.block_tables, kept.numpy())
    return AttentionMetadata(*arrays, *map(torch.from_numpy, arrays), meta.max_query_len, meta.max_context_len)


@pytest.mark.parametrize("device", DEVICES)
def test_sizes_that_do_not_fit_are_refused(device: str) -> None:
    meta, num_blocks = metadata([(2, 5)], 4)
    meta = on_device(meta, device)
    cache = empty_cache(num_blocks, 4, (8, 8), torch.float32, device)
    for shape in ((3, HEADS, 8), (2, HEADS + 1, 8), (2, HEADS, 4)):
        with pytest.raises(ValueError, match="do not fit 2 slots"):
            kv_write_triton.write_kv(torch.zeros(shape, device=device), torch.zeros(shape, device=device), cache, meta)
