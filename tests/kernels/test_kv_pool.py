from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.kernels import kv_pool
from peft_dist.kernels.kv_copy import KVCopier
from peft_dist.kernels.kv_pool import KVCachePool, block_bytes

SHAPES = [(2, 4), (1, 8), (2, 4)]


def numbered_pool(num_blocks: int, num_host_blocks: int = 0, device: str = "cpu") -> KVCachePool:
    """Every block of every layer holds a number of its own."""
    pool = KVCachePool(SHAPES, num_blocks, 3, torch.float32, device, num_host_blocks)
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


@pytest.mark.parametrize("piece", [1, 200, 1 << 20])
def test_many_blocks_are_swapped_in_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes memory beside the blocks."""
    monkeypatch.setattr(kv_pool, "_PIECE_BYTES", piece)
    pool = numbered_pool(6, num_host_blocks=6)
    pool.swap_out([(block, 5 - block) for block in range(6)])
    pool.swap_in([(block, block) for block in range(6)])
    assert numbers(pool)[1][1] == [1105, 1104, 1103, 1102, 1101, 1100]
    pool.swap_out([])
    pool.swap_in([])


def test_host_blocks_are_read_when_their_copies_are_done() -> None:
    """A copier has a thread of its own, and swaps are only queued."""
    pool: Any = numbered_pool(4, num_host_blocks=2)
    pool.swapped = SimpleNamespace(synchronize=lambda: KVCachePool.swap_out(pool, [(3, 0), (1, 1)]))
    flat = torch.empty(2 * pool.bytes_per_block, dtype=torch.uint8)
    KVCopier(pool).read([0, 1], flat, on_host=True)
    expected = torch.empty_like(flat)
    KVCopier(pool).read([3, 1], expected)
    assert torch.equal(flat, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nobody_waits_for_swaps_and_all_that_follows_comes_behind_them() -> None:
    pool = numbered_pool(64, 32, "cuda")
    out = list(range(32))
    # Whatever the first calls set up: of as many blocks, because CUDA waits for the device to give pinned memory, of
    # which torch keeps what was had once.
    pool.swap_out([(block, 31 - block) for block in out])
    pool.swap_in([(31 - block, block) for block in out])
    before = numbers(pool)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        # The device is busy for long, so that whatever does not wait for its turn is seen.
        torch.cuda._sleep(200_000_000)
        pool.swap_out([(block, 31 - block) for block in out])
        assert pool.swapped is not None and not pool.swapped.query(), "the host waited"
        for cache in pool.caches:
            for tensor in cache:
                tensor[:32].fill_(-1.0)
        pool.swap_in([(31 - block, 32 + block) for block in out])
        # Host blocks are used again at once.
        pool.swap_out([(0, block) for block in out])
        assert not pool.swapped.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    flat = torch.empty(pool.bytes_per_block, dtype=torch.uint8)
    KVCopier(pool).read([7], flat, on_host=True)
    assert (flat.view(torch.float32) == -1.0).all()
    for was, now in zip(before, numbers(pool), strict=True):
        for old, new in zip(was, now, strict=True):
            assert new[:32] == [-1] * 32 and new[32:] == old[:32]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copier_comes_behind_swaps_that_are_queued() -> None:
    pool = numbered_pool(8, 4, "cuda")
    flat = torch.empty(pool.bytes_per_block, dtype=torch.uint8)
    KVCopier(pool).read([5], flat)
    copier = KVCopier(pool)
    torch.cuda._sleep(200_000_000)
    # Its block is another one's as soon as the swap is queued, which then reads what it held before.
    pool.swap_out([(2, 0)])
    copier.write([2], flat)
    pool.swap_in([(0, 3)])
    assert numbers(pool)[0][0] == [0, 1, 5, 2, 4, 5, 6, 7]
