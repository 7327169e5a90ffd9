"""Merged weights, and plans that take an adapter's part away again, against the plain twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.kernels import lora, merge, reference
from peft_dist.kernels.merge import MergeItem, merge_group_, merge_into_
from tests.kernels.cases import BACKENDS, TOLERANCE, assert_close, layer_of, plan_of, skip_without

DTYPES = tuple(TOLERANCE)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def random_item(
    rows: int, columns: int, rank: int, dtype: torch.dtype, adapter: torch.dtype, seed: int, device: str = "cpu"
) -> MergeItem:
    """Whose out is uninitialised (NaN)."""
    generator = torch.Generator().manual_seed(seed)
    base, A, B = (torch.randn(*s, generator=generator) for s in ((rows, columns), (rank, columns), (rows, rank)))
    out = torch.full((rows, columns), float("nan"), dtype=dtype, device=device)
    return MergeItem(out, base.to(device, dtype), A.to(adapter), (B / rank).to(adapter), 0.75)


def expected(item: MergeItem) -> torch.Tensor:
    out, base, A, B, scaling = item
    return reference.merge_into_(torch.empty_like(out), base, A.to(out.device), B.to(out.device), scaling)


@settings(deadline=None, max_examples=80)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 70), st.integers(1, 20)),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    seed=st.integers(0, 2**31),
    chunk=st.sampled_from([1, 64, 1 << 19]),
)
def test_equals_reference(
    sizes: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype], seed: int, chunk: int
) -> None:
    item = random_item(*sizes, *dtypes, seed)
    before = [tensor.clone() for tensor in item[1:4]]
    whole, merge._CHUNK = merge._CHUNK, chunk
    try:
        assert merge_into_(*item) is item.out
        in_place = item.base.clone()
        merge_into_(in_place, in_place, *item[2:])
    finally:
        merge._CHUNK = whole
    assert_close(item.out, expected(item))
    assert torch.equal(in_place, item.out)
    assert all(torch.equal(a, b) for a, b in zip(before, item[1:4], strict=True))


def test_is_rounded_once() -> None:
    """bfloat16 sums of many ranks would be off by more than half a unit in the last place."""
    item = random_item(64, 96, 64, torch.bfloat16, torch.float32, 0)
    merge_into_(*item)
    exact = item.base.double() + item.scaling * (item.B.double() @ item.A.double())
    half_a_unit = torch.finfo(torch.bfloat16).eps / 2 * exact.abs().clamp(min=1e-30) * 1.001
    assert ((item.out.double() - exact).abs() <= half_a_unit + 1e-6).all()


def test_transposed_parts_and_strided_weights() -> None:
    """What Conv1D, embeddings, and q/k/v as parts of one buffer need."""
    item = random_item(24, 40, 4, torch.float32, torch.float32, 1)
    turned = MergeItem(torch.empty(40, 24), item.base.T.contiguous(), item.B.T, item.A.T, item.scaling)
    merge_into_(*turned)
    assert_close(turned.out.T.contiguous(), expected(item))
    wide = torch.zeros(24, 100)
    merge_into_(wide[:, 30:70], *item[1:])
    assert_close(wide[:, 30:70].contiguous(), expected(item))
    assert not wide[:, :30].any() and not wide[:, 70:].any()


def test_items_that_do_not_fit_are_refused_before_anything_is_written() -> None:
    good = random_item(6, 8, 2, torch.float32, torch.float32, 0)
    bad = (
        good._replace(A=torch.zeros(2, 7)),
        good._replace(B=torch.zeros(5, 2)),
        good._replace(B=torch.zeros(6, 3)),
        good._replace(base=torch.zeros(6, 9)),
        good._replace(base=good.base.bfloat16()),
        good._replace(A=torch.zeros(2, 8, dtype=torch.int8)),
    )
    for item in bad:
        with pytest.raises(ValueError, match="merge: "):
            merge_group_([good, item])
    assert good.out.isnan().all()
    merge_group_([])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_unlike_weights(device: str, dtype: torch.dtype) -> None:
    shapes = [(64, 128, 8), (64, 128, 8), (65, 130, 8), (200, 33, 3), (64, 128, 40), (1, 1, 1), (512, 576, 16)]
    items = [random_item(*shape, dtype, torch.float32, seed, device) for seed, shape in enumerate(shapes)]
    turned = random_item(48, 80, 6, dtype, torch.float32, 9, device)
    items.append(turned._replace(A=turned.A.T.contiguous().T, B=turned.B.T.contiguous().T))
    columns = random_item(30, 50, 5, dtype, torch.float32, 10, device)
    items.append(columns._replace(out=torch.empty(50, 30, dtype=dtype, device=device).T))
    merge_group_(items)
    for item in items:
        assert_close(item.out.contiguous().cpu(), expected(item).contiguous().cpu())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [-1.0, 0.5])
def test_a_plan_has_a_factor(backend: str, dtype: torch.dtype, factor: float) -> None:
    skip_without(backend, dtype)
    weights = layer_of([3, 0, 9], (40, 24), dtype, seed=4)
    slots = np.array([0, 2, -1, 2, 1, 0])
    plan, plain = plan_of(slots, backend), plan_of(slots, backend)
    plan.factor = factor
    x, y = torch.randn(6, 40).to(dtype), torch.randn(6, 24).to(dtype)
    ids = torch.tensor([0, 39, 5, 5, 7, 1])
    for add, inputs in ((lora.add_lora_, x), (lora.add_embedding_lora_, ids)):
        twin = getattr(reference, add.__name__)
        got = add(y.clone(), inputs, weights, plan)
        assert_close(got, twin(y.clone(), inputs, weights, plan))
        delta = twin(torch.zeros(6, 24), inputs, weights, plain)
        assert_close(got, (y.float() + factor * delta).to(dtype))
        if factor == -1.0 and dtype == torch.float32:
            assert_close(add(add(y.clone(), inputs, weights, plain), inputs, weights, plan), y)
