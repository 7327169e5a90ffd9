"""Matrices come into their pages by one launch as they do copy by copy, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.kernels.lora_fill import Entry, fill_from_device, rehearse_fill
from peft_dist.kernels.lora_layer import PooledLayer
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.kernels.transfer import move_together
from tests.kernels.lora_cases import DEVICES, HAS_GPU

pytest.importorskip("triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = "cuda" if HAS_GPU else "cpu"


def poisoned_layer(in_features: int, out_features: int, dtype: torch.dtype, num_pages: int) -> PooledLayer:
    layer = PooledLayer(in_features, out_features, torch.device(DEVICE), dtype, 8)
    layer.grow(num_pages)
    layer.weights.A.fill_(float("nan"))
    layer.weights.B.fill_(float("nan"))
    return layer


def assert_holds(layer: PooledLayer, pages: list[int], A: torch.Tensor, B: torch.Tensor) -> None:
    """These pages hold the matrices, rounded once, and all other rows what they held: NaN."""
    rows = [page * 8 + row for page in pages for row in range(8)][: len(A)]
    others = sorted(set(range(len(layer.weights.A))) - set(rows))
    for pool, part in ((layer.weights.A, A), (layer.weights.B, B.T)):
        found, wanted = pool[rows].cpu().float(), part.cpu().to(pool.dtype).float()
        # Triton's interpreter cuts bfloat16 off where a GPU rounds.
        exact = HAS_GPU or pool.dtype != torch.bfloat16 or part.dtype == torch.bfloat16
        assert torch.equal(found, wanted) if exact else torch.allclose(found, wanted, rtol=2**-7, atol=0)
        assert pool[others].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_all_layers_of_an_adapter(source: torch.dtype, target: torch.dtype, device: str) -> None:
    sizes = [(96, 2500, 3, [4]), (1030, 64, 20, [5, 0, 1]), (7, 1, 8, [2]), (64, 1024, 17, [1, 2, 5])]
    layers = [poisoned_layer(ins, outs, target, 6) for ins, outs, _, _ in sizes]
    # As a file is read: one buffer, on the host.
    flat = torch.randn(sum(rank * (ins + outs) for ins, outs, rank, _ in sizes) + 5).to(source)
    entries = []
    start = 5
    for layer, (ins, outs, rank, pages) in zip(layers, sizes, strict=True):
        A = flat[start : start + rank * ins].view(rank, ins)
        start += rank * ins
        entries.append(Entry(layer, pages, A, flat[start : start + outs * rank].view(outs, rank)))
        start += outs * rank
    moved = move_together([part for *_, A, B in entries for part in (A, B)], lambda part: part.to(device, copy=True))
    assert len(moved.memory) == 1
    fill_from_device(entries, moved)
    for layer, pages, A, B in entries:
        assert_holds(layer, list(pages), A, B)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 40), st.integers(1, 1100), st.integers(1, 1100), st.sampled_from(DTYPES), st.booleans(),
            st.permutations(range(6)),
        ),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_any_ranks_pages_and_types(asked: list[tuple[int, int, int, torch.dtype, bool, list[int]]]) -> None:
    entries = []
    for rank, ins, outs, dtype, turned, pages in asked:
        layer = poisoned_layer(ins, outs, torch.float32, 6)
        B = torch.randn(rank, outs).to(dtype).T if turned else torch.randn(outs, rank).to(dtype)
        entries.append(Entry(layer, pages[: -(-rank // 8)], torch.randn(rank, ins).to(dtype), B))
    parts = [part for *_, A, B in entries for part in (A, B)]
    fill_from_device(entries, move_together(parts, lambda part: part.to(DEVICE, copy=True)))
    for layer, pages, A, B in entries:
        assert_holds(layer, list(pages), A, B)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pool_is_filled_by_a_launch_for_each_type(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_dist.kernels import lora_fill_triton

    launches, fill = [], lora_fill_triton.fill_rows
    monkeypatch.setattr(lora_fill_triton, "fill_rows", lambda *asked: (launches.append(asked[1]), fill(*asked)))
    pool = LoRAPool("cuda", torch.bfloat16, page_rows=8, num_rows=64, num_slots=4)
    for _ in range(30):
        pool.add_layer(256, 512)
    weights = {i: (torch.randn(12, 256).to(dtype), torch.randn(512, 12).to(dtype), 0.5) for i in range(30)}
    pool.fill(reservation := pool.reserve(2, dict.fromkeys(range(30), 12)), weights)
    pool.publish(reservation)
    assert launches == [dtype]
    for index, (A, B, scaling) in pool.read(2).items():
        assert torch.equal(A.cpu(), weights[index][0].bfloat16()) and torch.equal(B.cpu(), weights[index][1].bfloat16())
        assert scaling == 0.5


def test_a_rehearsal_writes_nothing() -> None:
    rehearse_fill(torch.empty(0, dtype=torch.float32, device=DEVICE))
