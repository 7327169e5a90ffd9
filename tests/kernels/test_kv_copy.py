"""KV blocks to flat memory and back."""

from __future__ import annotations

import pytest
import torch

from peft_dist.kernels import kv_copy
from peft_dist.kernels.kv_copy import KVCopier
from peft_dist.kernels.kv_pool import KVCachePool

SHAPES = [(2, 4), (1, 8), (2, 4), (3, 4)]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def random_pool(device: str, seed: int, num_host_blocks: int = 0) -> KVCachePool:
    pool = KVCachePool(SHAPES, 12, 3, torch.bfloat16, device, num_host_blocks)
    torch.manual_seed(seed)
    for group in pool.groups():
        group.copy_(torch.randn(group.shape))
    return pool


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("piece", [1, 400, 1 << 20])
def test_blocks_arrive_in_other_places_and_nothing_else_changes(
    device: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_copy, "_PIECE_BYTES", piece)
    source, target = random_pool(device, 1), random_pool(device, 2)
    before = [[t.clone() for t in cache] for cache in target.caches]
    flat = torch.empty(5 * source.bytes_per_block, dtype=torch.uint8)
    taken, given = [7, 0, 11, 3, 4], [2, 9, 1, 0, 5]
    KVCopier(source).read(taken, flat)
    KVCopier(target).write(given, flat)
    kept = [block for block in range(12) if block not in given]
    for ours, theirs, old in zip(source.caches, target.caches, before, strict=True):
        for own, other, was in zip(ours, theirs, old, strict=True):
            assert torch.equal(own[taken], other[given])
            assert torch.equal(other[kept], was[kept])


class Flat:
    """Memory that is reached by copies alone."""

    def __init__(self, num_bytes: int, device: str) -> None:
        self.contents = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def put(self, offset: int, piece: torch.Tensor) -> None:
        assert piece.is_contiguous()
        self.contents[offset : offset + piece.nbytes].copy_(piece.flatten().view(torch.uint8))

    def get(self, offset: int, piece: torch.Tensor) -> None:
        assert piece.is_contiguous()
        piece.view(-1).view(torch.uint8).copy_(self.contents[offset : offset + piece.nbytes])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("piece", [1, 400, 1 << 20])
def test_flat_memory_that_is_reached_by_copies_has_the_same_bytes(
    device: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_copy, "_PIECE_BYTES", piece)
    source, target, other = (random_pool(device, seed) for seed in (1, 2, 2))
    host = torch.empty(5 * source.bytes_per_block, dtype=torch.uint8)
    flat = Flat(len(host), device)
    taken, given = [7, 0, 11, 3, 4], [2, 9, 1, 0, 5]
    KVCopier(source).read(taken, host)
    KVCopier(source).read_into(taken, flat)
    assert torch.equal(flat.contents.cpu(), host)
    KVCopier(target).write(given, host)
    KVCopier(other).write_from(given, flat)
    assert all(torch.equal(a, b) for a, b in zip(target.groups(), other.groups(), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_host_blocks_are_read_where_they_are(device: str) -> None:
    source, target = random_pool(device, 1, num_host_blocks=4), random_pool(device, 2)
    source.swap_out([(5, 3), (6, 1)])
    flat = torch.empty(2 * source.bytes_per_block, dtype=torch.uint8)
    KVCopier(source).read([3, 1], flat, on_host=True)
    KVCopier(target).write([0, 8], flat)
    for ours, theirs in zip(source.caches, target.caches, strict=True):
        assert all(torch.equal(own[[5, 6]], other[[0, 8]]) for own, other in zip(ours, theirs, strict=True))


def test_pools_that_differ_have_other_layouts() -> None:
    layouts = {
        KVCachePool(shapes, 2, size, dtype, "cpu").layout
        for shapes in (SHAPES, SHAPES[::-1], SHAPES[1:])
        for size in (3, 4)
        for dtype in (torch.bfloat16, torch.float16)
    }
    assert len(layouts) == 12
