"""Slots of the pool merged into weights by one launch a shape, against what float64 makes of the same factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.kernels.merge import merge_into_
from peft_dist.kernels.pooled_adapter import PooledItem
from peft_dist.kernels.types import LoRALayerWeights
from tests.kernels.lora_cases import DEVICES, HAS_GPU, layers_of

pytest.importorskip("triton")

from peft_dist.kernels.merge_pool_triton import MergeTable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# 40 ranks lie in five scattered pages; 130 take several rounds of the loop.
RANKS = ((3, 0, 16, 40), (1, 8, 20, 0), (5, 0, 130, 1))


def random_item(
    weights: LoRALayerWeights, dtype: torch.dtype, seed: int, turned: bool = False, row_stride: int = 0
) -> PooledItem:
    """Whose out is NaN; ``row_stride`` columns lie between rows, most of them nobody's."""
    sizes = (weights.A.shape[1], weights.B.shape[1]) if turned else (weights.B.shape[1], weights.A.shape[1])
    wide = (sizes[0], max(sizes[1], row_stride))
    base = torch.randn(*wide, generator=torch.Generator().manual_seed(seed)).to(weights.A.device, dtype)
    base[0, 0] = -0.0
    out = torch.full_like(base, float("nan"))
    return PooledItem(out[:, : sizes[1]], base[:, : sizes[1]], weights, turned)


def assert_merged(item: PooledItem, slot: int) -> None:
    """Off by no more than rounding once costs, and by what float32 sums do."""
    out, base, weights, turned = item
    known = 0 <= slot < len(weights.rank) and weights.rank[slot] > 0
    if not known:
        assert torch.equal(out, base) and torch.equal(out.signbit(), base.signbit()), "the base's bits"
        return
    rows = torch.from_numpy(weights.rows_of(slot)).to(out.device)
    A, B = weights.A[rows].double(), weights.B[rows].double()
    delta = float(weights.scaling[slot]) * (A.T @ B if turned else B.T @ A)
    exact = base.double() + delta
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    step = torch.finfo(out.dtype).eps / (1 if out.dtype == torch.bfloat16 and not HAS_GPU else 2)
    allowed = 1.01 * step * exact.abs() + 4e-6 * (delta.abs().max() + base.double().abs().max())
    assert out.isfinite().all() and ((out.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("adapter", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_slot_is_merged_from_its_pages(dtype: torch.dtype, adapter: torch.dtype, turned: bool, device: str) -> None:
    outs = (96, 160, 96)
    layers = layers_of(device, RANKS, 144, outs, adapter, 7, cpu_tables=True)
    items = [random_item(layer, dtype, seed, turned) for seed, layer in enumerate(layers)]
    table = MergeTable(items)
    assert table.num_launches == len(set(outs))
    for slot in range(len(RANKS[0])):
        for item in items:
            item.out.fill_(float("nan"))
        table.merge(slot, max(ranks[slot] for ranks in RANKS))
        for item in items:
            assert_merged(item, slot)


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    ranks=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    stride=st.sampled_from([0, 155, 160]),
    turned=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_any_shape_and_rank(
    sizes: tuple[int, int],
    ranks: list[int],
    dtypes: tuple[torch.dtype, torch.dtype],
    stride: int,
    turned: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    device = "cuda" if HAS_GPU else "cpu"
    ranks = [*ranks, 1]
    [layer] = layers_of(device, [ranks], sizes[0], [sizes[1]], dtypes[1], seed % 1000, cpu_tables=True)
    item = random_item(layer, dtypes[0], seed, turned, stride)
    slot = data.draw(st.integers(0, len(ranks)))
    MergeTable([item]).merge(slot, max(ranks))
    assert_merged(item, slot)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_merge_of_copies(dtype: torch.dtype, device: str) -> None:
    """Of parts of one buffer, as those of q/k/v are, the middle one at an odd address."""
    layers = layers_of(device, [(9,)] * 3, 72, (17, 15, 32), dtype, 3, cpu_tables=True)
    base = torch.randn(64, 72, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    out = torch.full_like(base, float("nan"))
    parts = zip(out.split([17, 15, 32]), base.split([17, 15, 32]), layers, strict=True)
    items = [PooledItem(part, weight, layer, False) for part, weight, layer in parts]
    MergeTable(items).merge(0, 9)
    for item in items:
        rows = torch.from_numpy(item.weights.rows_of(0)).to(device)
        A, B, scaling = item.weights.A[rows], item.weights.B[rows].T, float(item.weights.scaling[0])
        expected = merge_into_(torch.empty_like(item.base), item.base, A, B, scaling)
        step = torch.finfo(dtype).eps if dtype != torch.float32 else 4e-6
        assert ((item.out - expected).abs() <= step * expected.abs() + 2e-6).all()


def test_what_the_kernel_cannot_do_has_a_reason() -> None:
    [layer] = layers_of("cpu", [(4,)], 24, (40,), torch.float32, 0, cpu_tables=True)
    [plain] = layers_of("cpu", [(4,)], 24, (40,), torch.float32, 0)
    good = random_item(layer, torch.float32, 0)
    assert good.reason_against is None
    turned = torch.zeros(24, 40).T
    bad = {
        "does not fit": (good._replace(turned=True), good._replace(base=good.base[:, 1:])),
        "scattered": (good._replace(out=turned), good._replace(base=turned)),
        "no tables": (good._replace(weights=plain),),
    }
    for reason, items in bad.items():
        for item in items:
            assert reason in str(item.reason_against)
