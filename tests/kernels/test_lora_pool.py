"""Row ownership of the LoRA pool and of its allocator under random histories."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.kernels.lora_pool import LayerTensors, LoRAPool
from peft_dist.kernels.row_allocator import RowAllocator

SIZES = [(6, 4), (3, 5), (8, 8)]


@settings(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_allocated_ranges_never_overlap_and_none_are_lost(operations: list[tuple[bool, int]]) -> None:
    rows, owned = RowAllocator(), []
    for allocate, size in operations:
        if allocate:
            first = rows.allocate(size)
            if first is None:
                rows.grow(max(2 * rows.capacity, rows.capacity + size))
                first = rows.allocate(size)
            assert first is not None
            owned.append((first, size))
        elif owned:
            rows.free(*owned.pop(size % len(owned)))
        assert rows.find_inconsistency(owned) is None
        assert rows.num_free == rows.capacity - sum(n for _, n in owned)
    for piece in owned:
        rows.free(*piece)
    assert rows.capacity == 0 or rows.allocate(rows.capacity) == 0, "free neighbours did not merge"


def test_the_lowest_range_that_fits_is_taken() -> None:
    rows = RowAllocator(10)
    assert [rows.allocate(n) for n in (2, 3, 5)] == [0, 2, 5]
    rows.free(2, 3)
    assert rows.allocate(4) is None
    assert rows.allocate(1) == 2
    assert rows.allocate(2) == 3


def test_inconsistencies_are_found() -> None:
    rows = RowAllocator(4)
    rows.allocate(2)
    assert rows.find_inconsistency([(0, 2)]) is None
    for wrong in ([], [(0, 1)], [(0, 3)], [(0, 2), (1, 1)]):
        assert rows.find_inconsistency(wrong)


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
            rows = slice(int(held.row_start[slot]), int(held.row_start[slot]) + int(held.rank[slot]))
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


def test_ranks_are_not_padded() -> None:
    pool = LoRAPool("cpu", torch.bfloat16)
    pool.add_layer(100, 50)
    pool.load(0, {0: (torch.ones(3, 100), torch.ones(50, 3), 1.0)})
    assert pool.num_bytes == 3 * 150 * 2
    pool.load(9, {0: (torch.ones(3, 100), torch.ones(50, 3), 1.0)})
    assert pool.num_bytes == 6 * 150 * 2


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
