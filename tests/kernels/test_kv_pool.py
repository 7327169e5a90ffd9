from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.kernels.kv_pool import KVCachePool, block_bytes

SHAPES = [(2, 4), (1, 8), (2, 4)]


def numbered_pool(num_blocks: int, num_host_blocks: int = 0) -> KVCachePool:
    """Every block of every layer holds a number of its own."""
    pool = KVCachePool(SHAPES, num_blocks, 3, torch.float32, "cpu", num_host_blocks)
    for layer, cache in enumerate(pool.caches):
        for part, tensor in enumerate(cache):
            numbers = torch.arange(num_blocks) + 1000 * layer + 100 * part
            tensor.copy_(numbers[:, None, None, None].expand_as(tensor))
    return pool


def numbers(pool: KVCachePool) -> list[list[list[int]]]:
    return [[tensor[:, 0, 0, 0].int().tolist() for tensor in cache] for cache in pool.caches]


def test_caches_have_the_shapes_asked_for_and_share_nothing() -> None:
    pool = numbered_pool(5)
    assert [c.key.shape for c in pool.caches] == [(5, 3, *shape) for shape in SHAPES]
    assert all(t.is_contiguous() for cache in pool.caches for t in cache)
    assert numbers(pool) == [[[1000 * n + 100 * p + b for b in range(5)] for p in (0, 1)] for n in range(3)]


def test_bytes_of_a_block_are_those_of_the_tensors() -> None:
    pool = KVCachePool(SHAPES, 7, 16, torch.bfloat16, "cpu")
    stored = sum(t.numel() * t.element_size() for cache in pool.caches for t in cache)
    assert pool.bytes_per_block * 7 == stored
    assert block_bytes([(3, 64)] * 30, 16, torch.float32) == 30 * 2 * 16 * 3 * 64 * 4


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_blocks_survive_a_stay_on_the_host(data: st.DataObject) -> None:
    pool = numbered_pool(6, num_host_blocks=4)
    before = numbers(pool)
    out = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True))
    host = data.draw(st.permutations(range(4)))[: len(out)]
    pool.swap_out(list(zip(out, host, strict=True)))
    for cache in pool.caches:
        for tensor in cache:
            tensor[out] = -1
    back = data.draw(st.permutations(range(6)))[: len(out)]
    pool.swap_in(list(zip(host, back, strict=True)))
    for layer_before, layer in zip(before, numbers(pool), strict=True):
        for old, new in zip(layer_before, layer, strict=True):
            assert [new[b] for b in back] == [old[b] for b in out]


def test_copies_read_before_they_write() -> None:
    pool = numbered_pool(4)
    pool.copy([(0, 1), (1, 0), (2, 3)])
    assert numbers(pool)[0][0] == [1, 0, 2, 2]
    pool.copy([])
    assert numbers(pool)[2][1] == [2101, 2100, 2102, 2102]
