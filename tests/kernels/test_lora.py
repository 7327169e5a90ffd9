"""Both back ends of the LoRA kernels against the plain twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.kernels import lora, reference
from peft_dist.kernels.types import LoRAPlan
from tests.kernels.cases import BACKENDS, TOLERANCE, assert_close, layer_of, plan_of, row_slots, skip_without

DTYPES = tuple(TOLERANCE)
sizes = st.sampled_from([(1, 1), (7, 5), (16, 16), (33, 64), (64, 33), (100, 31), (129, 97), (576, 192)])
ranks = st.lists(st.integers(0, 20), min_size=1, max_size=6)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(data=st.data(), ranks=ranks, sizes=sizes, seed=st.integers(0, 2**31))
def test_equals_reference(
    backend: str, data: st.DataObject, ranks: list[int], sizes: tuple[int, int], seed: int
) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    pool_dtype = data.draw(st.sampled_from((torch.float32, dtype, torch.bfloat16)))
    skip_without(backend, dtype)
    if not any(ranks):
        ranks[0] = 3
    weights = layer_of(ranks, sizes, pool_dtype, seed)
    plan = plan_of(data.draw(row_slots(len(ranks))), backend)
    generator = torch.Generator().manual_seed(seed)
    padding = data.draw(st.integers(0, 3))
    x, y = (torch.randn(plan.num_rows, n + padding, generator=generator).to(dtype)[:, :n] for n in sizes)
    expected = reference.add_lora_(y.clone(), x, weights, plan)
    wide = torch.full((plan.num_rows, sizes[1] + 2), 7.0, dtype=dtype)
    wide[:, : sizes[1]] = y
    got = wide[:, : sizes[1]]
    assert lora.add_lora_(got, x, weights, plan) is got
    assert_close(got, expected)
    assert (wide[:, sizes[1] :] == 7).all(), "wrote outside of y"
    alone = np.isin(np.repeat(plan.slots, np.diff(plan.starts)), np.flatnonzero(weights.rank), invert=True)
    assert torch.equal(got[alone], y[alone]), "rows without an adapter changed"


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), members=st.lists(ranks, min_size=1, max_size=3), seed=st.integers(0, 2**31))
def test_layers_of_one_input_equal_reference(
    backend: str, data: st.DataObject, members: list[list[int]], seed: int
) -> None:
    """Parts of one wide output, some of whose layers nobody adapts."""
    dtype = data.draw(st.sampled_from(DTYPES))
    skip_without(backend, dtype)
    outs = [data.draw(st.sampled_from([1, 16, 40, 300])) for _ in members]
    layers = [layer_of(r, (64, o), dtype, seed) if any(r) else None for r, o in zip(members, outs, strict=True)]
    plan = plan_of(data.draw(row_slots(max(map(len, members)))), backend)
    generator = torch.Generator().manual_seed(seed)
    x, wide = (torch.randn(plan.num_rows, n, generator=generator).to(dtype) for n in (64, sum(outs)))
    expected = wide.clone()
    for y, weights in zip(expected.split(outs, dim=1), layers, strict=True):
        if weights is not None:
            y.copy_(reference.add_lora_(y.clone(), x, weights, plan))
    lora.add_lora_group_(wide.split(outs, dim=1), x, layers, plan)
    assert_close(wide, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=30)
@given(data=st.data(), ranks=ranks, seed=st.integers(0, 2**31), scale=st.sampled_from((None, 24.0)))
def test_embedding_equals_reference(
    backend: str, data: st.DataObject, ranks: list[int], seed: int, scale: float | None
) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    skip_without(backend, dtype)
    if not any(ranks):
        ranks[0] = 1
    weights = layer_of(ranks, (50, 24), dtype, seed)
    plan = plan_of(data.draw(row_slots(len(ranks))), backend)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (plan.num_rows,), generator=generator)
    y = torch.randn(plan.num_rows, 24, generator=generator).to(dtype)
    expected = reference.add_embedding_lora_(y.clone(), ids, weights, plan, scale)
    assert_close(lora.add_embedding_lora_(y, ids, weights, plan, scale), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("part", ["A", "B"])
def test_a_broken_adapter_reaches_no_other_row(backend: str, bad: float, part: str) -> None:
    skip_without(backend, torch.float32)
    weights = layer_of([2, 3, 4], (40, 40), torch.float32, seed=1)
    plan = plan_of(np.array([0, 1, 1, 2, -1]), backend)
    x, y = torch.randn(5, 40), torch.randn(5, 40)
    expected = lora.add_lora_(y.clone(), x, weights, plan)
    getattr(weights, part)[weights.rows_of(1)[0]] = bad
    weights.version += 1
    got = lora.add_lora_(y.clone(), x, weights, plan)
    assert not torch.isfinite(got[1:3]).any()
    assert_close(got[[0, 3, 4]], expected[[0, 3, 4]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_rows_reach_no_other_row(backend: str) -> None:
    skip_without(backend, torch.float32)
    weights = layer_of([2, 3], (40, 40), torch.float32, seed=1)
    plan = plan_of(np.array([0, 0, 1, 1, -1]), backend)
    x, y = torch.randn(5, 40), torch.randn(5, 40)
    expected = lora.add_lora_(y.clone(), x, weights, plan)
    x[0], x[4] = float("nan"), float("inf")
    got = lora.add_lora_(y.clone(), x, weights, plan)
    assert got[0].isnan().all()
    assert_close(got[1:], expected[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [3, 200])
def test_threads_divide_the_work(backend: str, dtype: torch.dtype, num_threads: int, rows: int) -> None:
    """Many rows are divided by rows, few by ranks and columns."""
    skip_without(backend, dtype)
    weights = layer_of([16, 0, 7, 33], (300, 520), dtype, seed=3)
    plan = plan_of(np.sort(np.random.default_rng(0).integers(-1, 4, rows)), backend)
    x, y = torch.randn(rows, 300).to(dtype), torch.randn(rows, 520).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        got = lora.add_lora_(y.clone(), x, weights, plan)
    finally:
        torch.set_num_threads(before)
    assert_close(got, reference.add_lora_(y.clone(), x, weights, plan))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=20)
@given(slots=row_slots(4, max_rows=20))
def test_a_row_gets_the_same_bits_in_any_batch(dtype: torch.dtype, slots: np.ndarray) -> None:
    """Whatever other rows and adapters there are: a request's tokens must not depend on its neighbours."""
    skip_without("c", dtype)
    weights = layer_of([5, 8, 0, 17], (70, 90), dtype, seed=2)
    x, y = torch.randn(len(slots), 70).to(dtype), torch.randn(len(slots), 90).to(dtype)
    together = lora.add_lora_(y.clone(), x, weights, plan_of(slots, "c"))
    for row in range(len(slots)):
        alone = lora.add_lora_(y[row : row + 1].clone(), x[row : row + 1], weights, plan_of(slots[row : row + 1], "c"))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_versions_are_seen_and_scratch_is_not_shared_between_layers(backend: str) -> None:
    skip_without(backend, torch.float32)
    plan = plan_of(np.array([0, 1, 1]), backend)
    x, y = torch.randn(3, 20), torch.randn(3, 20)
    for seed, ranks in enumerate(([2, 3], [3, 2], [2, 0], [2, 3])):
        weights = layer_of(ranks, (20, 20), torch.float32, seed)
        assert_close(lora.add_lora_(y.clone(), x, weights, plan), reference.add_lora_(y.clone(), x, weights, plan))
        weights.scaling[0] *= 3
        weights.A[weights.rows_of(0)[0]] += 1
        weights.version += 1
        assert_close(lora.add_lora_(y.clone(), x, weights, plan), reference.add_lora_(y.clone(), x, weights, plan))


def test_sizes_that_do_not_fit_are_refused_before_memory_is_touched() -> None:
    skip_without("c", torch.float32)
    weights = layer_of([2], (20, 20), torch.float32, 0)
    plan = LoRAPlan.from_rows(np.zeros(4, int))
    assert plan is not None
    for rows, inputs, outputs in ((3, 20, 20), (4, 19, 20), (4, 20, 21)):
        with pytest.raises(ValueError, match="the plan and the layer"):
            lora.add_lora_(torch.zeros(rows, outputs), torch.zeros(rows, inputs), weights, plan)


def test_a_plan_is_made_only_for_rows_with_adapters() -> None:
    assert LoRAPlan.from_rows(np.array([-1, -1])) is None
    plan = LoRAPlan.from_rows(np.array([2, 2, -1, 0]))
    assert plan is not None
    assert plan.slots.tolist() == [2, -1, 0] and plan.starts.tolist() == [0, 2, 3, 4] and plan.num_rows == 4
