"""A pool that grows tells with its layout when what a captured kernel call goes by has changed."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.kernels.lora_pool import LoRAPool
from tests.kernels.test_lora_pool import SIZES, adapter

steps = st.lists(
    st.tuples(st.integers(0, 9), st.one_of(st.none(), st.lists(st.integers(0, 70), min_size=3, max_size=3))),
    min_size=1,
    max_size=15,
)


def addresses(pool: LoRAPool) -> list[object]:
    """Of what kernels read, by layer, and its sizes."""
    tensors = (
        tensor
        for held in pool.addressed_weights
        for tensor in (held.A, held.B, held.pages_t, held.rank_t, held.scaling_t)
    )
    return [None if t is None else (t.data_ptr(), t.shape, t.stride()) for t in tensors]


@settings(max_examples=60, deadline=None)
@given(steps)
def test_tables_on_the_device_follow_and_the_layout_tells_of_moves(history: list[tuple[int, list[int] | None]]) -> None:
    pool = LoRAPool("cpu", torch.float32, grows_tables=True)
    for n, m in SIZES:
        pool.add_layer(n, m)
    for seed, (slot, ranks) in enumerate(history):
        before, layout, room = addresses(pool), pool.layout, pool.workspace.max_rank
        if ranks is None:
            pool.drop(slot)
        else:
            pool.load(slot, adapter(ranks, seed))
        if pool.layout == layout:
            assert addresses(pool) == before and pool.workspace.max_rank == room
        for held in pool.weights:
            if held is None:
                continue
            assert held.rank_t is not None and held.pages_t is not None and held.scaling_t is not None
            assert np.array_equal(held.rank_t.numpy(), held.rank)
            for number in np.flatnonzero(held.rank):
                used = -(-held.rank[number] // held.page_rows)
                assert np.array_equal(held.pages_t.numpy()[number, :used], held.pages[number, :used])
                assert held.scaling_t[number] == held.scaling[number]


def test_the_same_adapter_again_moves_nothing() -> None:
    pool = LoRAPool("cpu", torch.float32, grows_tables=True)
    for n, m in SIZES:
        pool.add_layer(n, m)
    pool.load(0, adapter([4, 5, 6], 1))
    pool.load(1, adapter([9, 0, 6], 2))
    before, layout = addresses(pool), pool.layout
    for seed in (3, 4):
        pool.load(0, adapter([4, 5, 6], seed))
        pool.load(1, adapter([9, 0, 6], seed))
    assert pool.layout == layout and addresses(pool) == before
