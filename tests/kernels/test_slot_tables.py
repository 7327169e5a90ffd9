"""A sized pool's tables on its device say what its host tables say, whatever comes and goes, and never move."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.kernels import slot_tables
from peft_dist.kernels.lora_pool import LoRAPool
from tests.kernels.test_lora_pool import SIZES, adapter
from tests.kernels.test_lora_tables import addresses

steps = st.lists(
    st.tuples(st.integers(0, 3), st.one_of(st.none(), st.lists(st.integers(0, 20), min_size=3, max_size=3))),
    min_size=1,
    max_size=12,
)


def check(pool: LoRAPool) -> None:
    for held in pool.addressed_weights:
        assert held.rank_t is not None and held.pages_t is not None and held.scaling_t is not None
        # The host's tables grow with the slots, and double.
        both = min(len(held.rank), len(held.rank_t))
        assert np.array_equal(held.rank_t.numpy()[:both], held.rank[:both])
        assert not held.rank_t[both:].any() and not held.rank[both:].any()
        for slot in np.flatnonzero(held.rank):
            used = -(-held.rank[slot] // held.page_rows)
            assert np.array_equal(held.pages_t.numpy()[slot, :used], held.pages[slot, :used])
            assert held.scaling_t[slot] == held.scaling[slot]


@settings(max_examples=60, deadline=None)
@given(steps, st.sampled_from([1, 2, 128]))
def test_tables_follow_at_fixed_addresses(history: list[tuple[int, list[int] | None]], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_tables, "BLOCK_LAYERS", block)
        pool = LoRAPool("cpu", torch.float32, page_rows=8, num_rows=96, num_slots=4, grows_tables=True)
        for n, m in SIZES:
            pool.add_layer(n, m)
        before, layout = addresses(pool), pool.layout[0]
        for seed, (slot, ranks) in enumerate(history):
            if ranks is None:
                pool.drop(slot)
            else:
                pool.load(slot, adapter(ranks, seed))
            pool.check()
            check(pool)
        assert addresses(pool) == before and pool.layout[0] == layout


def test_a_layer_that_comes_later_leaves_the_others_where_they_are() -> None:
    pool = LoRAPool("cpu", torch.float32, page_rows=8, num_rows=32, num_slots=2, grows_tables=True)
    for n, m in SIZES[:2]:
        pool.add_layer(n, m)
    pool.load(1, adapter([3, 9, 0], 0))
    before = addresses(pool)
    pool.add_layer(*SIZES[2])
    pool.load(0, adapter([1, 2, 17], 1))
    check(pool)
    assert addresses(pool)[: len(before)] == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_buffer_fills_pages_on_a_gpu() -> None:
    pool = LoRAPool("cuda", torch.bfloat16, num_rows=64, num_slots=4)
    for n, m in SIZES:
        pool.add_layer(n, m)
    weights = adapter([9, 4, 17], 0)
    sizes = [part.numel() for A, B, _ in weights.values() for part in (A, B)]
    buffer = torch.cat([part.flatten() for A, B, _ in weights.values() for part in (A, B)]).pin_memory()
    parts = iter(buffer.split(sizes))
    shared = {
        index: (next(parts).view(A.shape), next(parts).view(B.shape), scaling)
        for index, (A, B, scaling) in weights.items()
    }
    pool.load(2, shared)
    torch.cuda.synchronize()
    for index, (A, B, scaling) in pool.read(2).items():
        assert torch.equal(A.cpu(), shared[index][0].to(torch.bfloat16)) and scaling == shared[index][2]
        assert torch.equal(B.cpu(), shared[index][1].to(torch.bfloat16))
