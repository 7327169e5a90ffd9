"""Row ownership of the LoRA pool and of its allocator under random histories."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.kernels.lora_pool import LayerTensors, LoRAPool
from peft_dist.kernels.page_allocator import PageAllocator

SIZES = [(6, 4), (3, 5), (8, 8)]


@settings(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_allocated_pages_never_overlap_and_none_are_lost(operations: list[tuple[bool, int]]) -> None:
    allocator, owned = PageAllocator(3), []
    for allocate, count in operations:
        if allocate:
            lowest = sorted(set(range(allocator.capacity)) - {page for pages in owned for page in pages})[:count]
            pages = allocator.allocate(count)
            if len(lowest) < count:
                assert pages is None
                allocator.grow(allocator.capacity + count)
            else:
                assert pages == lowest
                owned.append(pages)
        elif owned:
            allocator.free(owned.pop(count % len(owned)))
        flat = [page for pages in owned for page in pages]
        assert allocator.find_inconsistency(flat) is None
        assert allocator.num_free == allocator.capacity - len(flat)


def test_inconsistencies_are_found() -> None:
    allocator = PageAllocator(4)
    allocator.allocate(2)
    assert allocator.find_inconsistency([0, 1]) is None
    for wrong in ([], [0], [0, 1, 2], [0, 1, 1]):
        assert allocator.find_inconsistency(wrong)


def adapter(ranks: list[int], seed: int) -> dict[int, LayerTensors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        i: (torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator), seed + 0.5)
        for i, (r, (n, m)) in enumerate(zip(ranks, SIZES, strict=True))
        if r
    }


def assert_holds(pool: LoRAPool, resident: dict[int, dict[int, LayerTensors]]) -> None:
    pool.check()
    for index in range(len(SIZES)):
        held = pool.weights[index]
        expected = {slot: layers[index] for slot, layers in resident.items() if index in layers}
        assert (held is None) == (not expected)
        for slot, (A, B, scaling) in expected.items():
            assert held is not None
            rows = torch.from_numpy(held.rows_of(slot))
            assert torch.equal(held.A[rows], A) and torch.equal(held.B[rows], B.T) and held.scaling[slot] == scaling


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.none() | st.lists(st.integers(0, 7), min_size=3, max_size=3)), max_size=25)
)
def test_the_pool_holds_what_was_loaded_last(history: list[tuple[int, list[int] | None]]) -> None:
    pool = LoRAPool("cpu", torch.float32)
    assert [pool.add_layer(*size) for size in SIZES] == [0, 1, 2]
    resident: dict[int, dict[int, LayerTensors]] = {}
    for step, (slot, ranks) in enumerate(history):
        versions = [w.version if w else -1 for w in pool.weights]
        if ranks is None:
            pool.drop(slot)
            resident.pop(slot, None)
        else:
            resident[slot] = adapter(ranks, step)
            pool.load(slot, resident[slot])
            for index in resident[slot]:
                held = pool.weights[index]
                assert held is not None and held.version > versions[index]
        assert_holds(pool, resident)
    for slot in list(resident):
        pool.drop(slot)
    assert_holds(pool, {})


def test_a_growing_pool_holds_whole_pages_and_no_more() -> None:
    pool = LoRAPool("cpu", torch.bfloat16, page_rows=2)
    pool.add_layer(100, 50)
    pool.load(0, {0: (torch.ones(3, 100), torch.ones(50, 3), 1.0)})
    assert pool.num_bytes == 4 * 150 * 2
    pool.load(9, {0: (torch.ones(3, 100), torch.ones(50, 3), 1.0)})
    assert pool.num_bytes == 8 * 150 * 2


@pytest.mark.parametrize(
    "bad",
    [
        {7: (torch.ones(2, 3), torch.ones(5, 2), 1.0)},
        {1: (torch.ones(2, 4), torch.ones(5, 2), 1.0)},
        {1: (torch.ones(2, 3), torch.ones(5, 3), 1.0)},
        {1: (torch.ones(0, 3), torch.ones(5, 0), 1.0)},
        {1: (torch.ones(3), torch.ones(5, 1), 1.0)},
    ],
)
def test_a_load_that_fails_leaves_the_slot_as_it_was(bad: dict[int, LayerTensors]) -> None:
    pool = LoRAPool("cpu", torch.float32)
    for size in SIZES:
        pool.add_layer(*size)
    resident = {2: adapter([2, 3, 0], 1)}
    pool.load(2, resident[2])
    with pytest.raises(ValueError, match="LoRA layer"):
        pool.load(2, {**adapter([4, 0, 4], 2), **bad})
    assert_holds(pool, resident)
    with pytest.raises(ValueError, match="negative"):
        pool.load(-1, {})


def test_a_slot_may_hold_an_adapter_of_no_layer() -> None:
    pool = LoRAPool("cpu", torch.float32)
    pool.add_layer(2, 2)
    pool.load(0, {})
    pool.check()
    assert pool.weights == [None]
    pool.drop(0)
    pool.drop(0)


def test_check_notices_damage() -> None:
    pool = LoRAPool("cpu", torch.float32)
    pool.add_layer(2, 2)
    pool.load(0, {0: (torch.ones(2, 2), torch.ones(2, 2), 1.0)})
    held = pool.weights[0]
    assert held is not None
    held.rank[0] = 1
    with pytest.raises(RuntimeError, match="layer 0"):
        pool.check()
