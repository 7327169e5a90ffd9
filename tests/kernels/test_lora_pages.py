"""The pool of fixed size: any free pages will do, nothing moves, and pages are filled beside running kernels."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.kernels import lora, lora_cpu, reference
from peft_dist.kernels.lora_pool import LayerTensors, LoRAPool, OutOfPagesError, Reservation
from tests.kernels.cases import BACKENDS, assert_close, plan_of, row_slots, skip_without

SIZES = [(5, 3), (2, 7), (4, 4)]
NUM_SLOTS = 6


def adapter(ranks: list[int], seed: int, sizes: list[tuple[int, int]] = SIZES) -> dict[int, LayerTensors]:
    """Rank 0: the layer is not adapted."""
    generator = torch.Generator().manual_seed(seed)
    return {
        i: (torch.randn(r, n, generator=generator), torch.randn(m, r, generator=generator), 0.5 + seed)
        for i, (r, (n, m)) in enumerate(zip(ranks, sizes, strict=True))
        if r
    }


def ranks_of(weights: dict[int, LayerTensors]) -> dict[int, int]:
    return {index: len(A) for index, (A, _, _) in weights.items()}


class Model:
    """What the pool should hold, and the pages and bits of everybody when they were stored."""

    def __init__(self, num_rows: int, page_rows: int) -> None:
        self.pool = LoRAPool("cpu", torch.float32, page_rows=page_rows, num_rows=num_rows)
        self.num_pages, self.page_rows = num_rows // page_rows, page_rows
        for size in SIZES:
            self.pool.add_layer(*size)
        self.addresses = self._addresses()
        self.held: dict[int, dict[int, LayerTensors]] = {}
        self.reserved: dict[int, tuple[Reservation, dict[int, LayerTensors]]] = {}
        self.pages: dict[int, dict[int, list[int]]] = {}

    def pages_of(self, rank: int) -> int:
        return -(-rank // self.page_rows)

    def fits(self, ranks: dict[int, int]) -> bool:
        owners = [*self.held.values(), *(weights for _, weights in self.reserved.values())]
        used = {i: sum(self.pages_of(ranks_of(w).get(i, 0)) for w in owners) for i in range(len(SIZES))}
        return all(used[index] + self.pages_of(rank) <= self.num_pages for index, rank in ranks.items())

    def store(self, slot: int, weights: dict[int, LayerTensors]) -> None:
        self.held[slot] = weights
        self.pages[slot] = {
            index: layer.weights.pages[slot, : self.pages_of(len(weights[index][0]))].tolist()
            for index, layer in enumerate(self.pool._layers)
            if index in weights
        }

    def settle(self, slot: int, keep: bool) -> None:
        reservation, weights = self.reserved.pop(slot)
        if not keep:
            self.pool.cancel(reservation)
            return
        self.pool.fill(reservation, weights)
        self.pool.publish(reservation)
        self.store(slot, weights)

    def drop(self, slot: int) -> None:
        self.pool.drop(slot)
        self.held.pop(slot, None)
        self.pages.pop(slot, None)

    def check(self) -> None:
        self.pool.check()
        assert self._addresses() == self.addresses, "a buffer moved"
        for slot, weights in self.held.items():
            for index, (A, B, scaling) in weights.items():
                table = self.pool.weights[index]
                assert table is not None
                assert table.pages[slot, : len(self.pages[slot][index])].tolist() == self.pages[slot][index], "moved"
                rows = torch.from_numpy(table.rows_of(slot))
                assert torch.equal(table.A[rows], A) and torch.equal(table.B[rows], B.T)
                assert table.scaling[slot] == scaling

    def _addresses(self) -> list[int]:
        return [t.data_ptr() for layer in self.pool._layers for t in (layer.weights.A, layer.weights.B)]


rank_lists = st.lists(st.sampled_from([0, *range(1, 129)]), min_size=len(SIZES), max_size=len(SIZES))
operations = st.lists(
    st.tuples(
        st.sampled_from(["load", "begin", "end", "cancel", "drop", "drop"]), st.integers(0, NUM_SLOTS - 1), rank_lists
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=150)
@given(operations, st.sampled_from([1, 4, 8]), st.integers(16, 40))
def test_an_adapter_loads_whenever_its_pages_are_free_and_nothing_moves(
    history: list[tuple[str, int, list[int]]], page_rows: int, num_pages: int
) -> None:
    model = Model(num_pages * page_rows, page_rows)
    for step, (what, slot, ranks) in enumerate(history):
        weights = adapter(ranks, step)
        if slot in model.reserved:
            if what in ("end", "cancel"):
                model.settle(slot, keep=what == "end")
        elif what == "drop":
            model.drop(slot)
        elif what in ("load", "begin"):
            model.drop(slot)
            if not model.fits(ranks_of(weights)):
                with pytest.raises(OutOfPagesError):
                    model.pool.reserve(slot, ranks_of(weights))
                with pytest.raises(OutOfPagesError):
                    model.pool.load(slot, weights)
            elif what == "load":
                model.pool.load(slot, weights)
                model.store(slot, weights)
            else:
                model.reserved[slot] = (model.pool.reserve(slot, ranks_of(weights)), weights)
        model.check()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_scattered_pages_compute_what_whole_ones_do(backend: str, data: st.DataObject, seed: int) -> None:
    """Pages are handed out in a random order; rows behind a rank hold NaN, which must not show."""
    skip_without(backend, torch.float32)
    ranks = data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=5))
    pool = LoRAPool("cpu", torch.float32, page_rows=data.draw(st.sampled_from([1, 4, 8])), num_rows=256)
    pool.add_layer(64, 40)
    whole = LoRAPool("cpu", torch.float32, page_rows=32, num_rows=256)
    whole.add_layer(64, 40)
    layer = pool._layers[0]
    layer.weights.A.fill_(float("nan"))
    layer.weights.B.fill_(float("nan"))
    for slot, rank in enumerate(ranks):
        layer.pages._free = np.random.default_rng(seed + slot).permutation(layer.pages._free).tolist()
        for one in (pool, whole):
            one.load(slot, adapter([rank], seed % 1000 + slot, [(64, 40)]))
    plan = plan_of(data.draw(row_slots(len(ranks), max_rows=30)), backend)
    torch.manual_seed(seed)
    x, y = torch.randn(plan.num_rows, 64), torch.randn(plan.num_rows, 40)
    ids = torch.randint(64, (plan.num_rows,))
    scattered, together = pool.weights[0], whole.weights[0]
    assert scattered is not None and together is not None
    # Of one rank all columns share the error of one sum, which may cancel: errors are of the sum of what was added up.
    sizes = replace(together, A=together.A.abs(), B=together.B.abs())
    added = reference.add_lora_(y.abs(), x.abs(), sizes, plan).max().item() if plan.num_rows else 1.0
    exact = reference.add_lora_(y.clone(), x, together, plan)
    for found in (lora.add_lora_(y.clone(), x, scattered, plan), reference.add_lora_(y.clone(), x, scattered, plan)):
        assert found.isfinite().all()
        assert not plan.num_rows or (found - exact).abs().max().item() <= 1e-6 * added
    assert_close(
        lora.add_embedding_lora_(y.clone(), ids, scattered, plan),
        reference.add_embedding_lora_(y.clone(), ids, together, plan),
    )


def test_neighbouring_pages_are_one_segment_and_no_padding_is_computed() -> None:
    pool = LoRAPool("cpu", torch.float32, page_rows=4, num_rows=64)
    pool.add_layer(8, 8)
    for slot, rank in enumerate((6, 9, 3)):
        pool.load(slot, adapter([rank], slot, [(8, 8)]))
    pool.drop(0)
    pool.load(3, adapter([10], 3, [(8, 8)]))  # Pages 0 and 1, which slot 0 had, and page 6.
    weights = pool.weights[0]
    assert weights is not None
    first, starts, rows = lora_cpu._segments(weights)
    assert first.tolist() == [0, 0, 1, 2, 4]
    assert starts.tolist() == [8, 20, 0, 24]
    assert rows.tolist() == [9, 3, 8, 2]


def test_reserved_pages_are_invisible_until_they_are_published() -> None:
    pool = LoRAPool("cpu", torch.float32, num_rows=32)
    pool.add_layer(5, 3)
    weights = adapter([6], 0, [(5, 3)])
    reservation = pool.reserve(2, {0: 6})
    assert pool.weights == [None] and pool.num_free_pages(0) == 6
    pool.check()
    with pytest.raises(ValueError, match="in use"):
        pool.reserve(2, {0: 1})
    with pytest.raises(ValueError, match="not filled"):
        pool.publish(reservation)
    thread = threading.Thread(target=pool.fill, args=(reservation, weights))
    thread.start()
    thread.join()
    assert pool.weights == [None]
    pool.publish(reservation)
    pool.check()
    assert pool.weights[0] is not None and pool.weights[0].rank[2] == 6
    for end in (pool.publish, pool.cancel):
        with pytest.raises(ValueError, match="not reserved"):
            end(reservation)
    pool.drop(2)
    pool.check()
    assert pool.num_free_pages(0) == 8 and pool.weights == [None]


def test_a_fill_with_other_tensors_is_refused() -> None:
    pool = LoRAPool("cpu", torch.float32, num_rows=32)
    for size in SIZES:
        pool.add_layer(*size)
    reservation = pool.reserve(0, {0: 4, 1: 2})
    for wrong in ([4, 0, 0], [4, 2, 1], [4, 3, 0]):
        with pytest.raises(ValueError, match="reserved for"):
            pool.fill(reservation, adapter(wrong, 0))
    pool.cancel(reservation)
    pool.check()
    for bad in ({9: 1}, {0: 0}):
        with pytest.raises(ValueError, match="LoRA layer"):
            pool.reserve(0, bad)


def test_a_load_that_does_not_fit_leaves_the_slot_as_it_was() -> None:
    pool = LoRAPool("cpu", torch.float32, page_rows=4, num_rows=16)
    pool.add_layer(5, 3)
    old = adapter([12], 0, [(5, 3)])
    pool.load(0, old)
    with pytest.raises(OutOfPagesError, match="rank 17 needs 5 pages of 4 rows, 4 of 4 are free"):
        pool.load(0, adapter([17], 1, [(5, 3)]))
    weights = pool.weights[0]
    assert weights is not None and torch.equal(weights.A[torch.from_numpy(weights.rows_of(0))], old[0][0])
    pool.load(0, adapter([16], 2, [(5, 3)]))
    pool.check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tables_on_a_gpu_follow_at_fixed_addresses() -> None:
    pool = LoRAPool("cuda", torch.bfloat16, num_rows=64, num_slots=4)
    pool.add_layer(5, 3)
    held = pool._layers[0].weights
    assert held.pages_t is not None and held.rank_t is not None and held.scaling_t is not None
    addresses = [t.data_ptr() for t in (held.A, held.B, held.pages_t, held.rank_t, held.scaling_t)]
    for step, (slot, rank) in enumerate([(1, 9), (3, 17), (1, 0), (0, 30)]):
        if rank:
            pool.load(slot, adapter([rank], step, [(5, 3)]))
        else:
            pool.drop(slot)
        pool.check()
        for s in np.flatnonzero(held.rank):
            count = -(-int(held.rank[s]) // pool.page_rows)
            assert held.pages_t[s, :count].tolist() == held.pages[s, :count].tolist()
        assert held.rank_t[: len(held.rank)].tolist() == held.rank.tolist()
        assert held.scaling_t[: len(held.rank)].tolist() == held.scaling.tolist()
    assert addresses == [t.data_ptr() for t in (held.A, held.B, held.pages_t, held.rank_t, held.scaling_t)]
    with pytest.raises(ValueError, match="does not exist"):
        pool.reserve(4, {0: 1})
