"""Layers, popularities and devices for the tests of the Triton LoRA kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from peft_dist.kernels import reference
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan

HAS_GPU = torch.cuda.is_available()
DEVICES = [
    # With a GPU here kernels are compiled for it, and the interpreter is off.
    pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="the interpreter runs where there is no GPU")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
POPULARITIES = ("identical", "distinct", "uniform", "zipf", "skewed")
SHARED_SLOT_RANKS = (1, 4, 8, 0, 16, 64, 128, 20)
# Frobenius norm of the error beside that of the added part; what rounding the exact output costs comes on top.
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 5e-4}


def popularity(kind: str, num_rows: int, num_slots: int, seed: int = 0) -> np.ndarray:
    """Slots of rows in no order; -1 and slots that do not exist among the uniform ones."""
    rng = np.random.default_rng(seed)
    if kind == "identical":
        return np.full(num_rows, rng.integers(num_slots), np.int32)
    if kind == "distinct":
        return rng.permutation(np.arange(num_rows) % num_slots).astype(np.int32)
    if kind == "uniform":
        return rng.integers(-1, num_slots + 2, num_rows).astype(np.int32)
    if kind == "zipf":
        return np.minimum(rng.zipf(1.5, num_rows) - 1, num_slots - 1).astype(np.int32)
    return np.where(rng.random(num_rows) < 0.8, 0, rng.integers(-1, num_slots, num_rows)).astype(np.int32)


def plan_of_rows(slots: np.ndarray, factor: float = 1.0) -> LoRAPlan:
    """Also where no row has an adapter."""
    plan = LoRAPlan.from_rows(np.concatenate([slots, [0]]), "triton")
    assert plan is not None
    plan.starts = np.minimum(plan.starts, len(slots))
    plan.factor = factor
    return plan


def layers_of(
    device: str,
    ranks: Sequence[Sequence[int]],
    in_features: int,
    outs: Sequence[int],
    dtype: torch.dtype,
    seed: int,
    *,
    cpu_tables: bool = False,
) -> list[LoRALayerWeights]:
    """Layers of one pool in which slot s has rank ``ranks[layer][s]``, in scattered pages; the rest of it holds NaN.

    Pools on a GPU have tables there; on a CPU only those with ``cpu_tables`` do.
    """
    num_slots = max(map(len, ranks))
    num_rows = max(sum(-(-r // 8) * 8 for r in some) for some in ranks) + 16
    grows_tables = cpu_tables and device == "cpu"
    pool = LoRAPool(device, dtype, page_rows=8, num_rows=num_rows, num_slots=num_slots, grows_tables=grows_tables)
    generator = torch.Generator().manual_seed(seed)
    for out in outs:
        pool.add_layer(in_features, out)
    for index, layer in enumerate(pool._layers):
        layer.weights.A.fill_(float("nan"))
        layer.weights.B.fill_(float("nan"))
        layer.pages._free = np.random.default_rng(seed + index).permutation(layer.pages._free).tolist()
    for slot in np.random.default_rng(seed).permutation(num_slots).tolist():
        adapter = {}
        for index, (some, out) in enumerate(zip(ranks, outs, strict=True)):
            if rank := some[slot]:
                A = torch.randn(rank, in_features, generator=generator) / in_features**0.5
                adapter[index] = (A, torch.randn(out, rank, generator=generator), 0.25 + slot / 4)
        pool.load(slot, adapter)
    pool.check()
    pool.workspace.take(1 << 22).fill_(float("nan"))
    return [layer.weights for layer in pool._layers]


def random_rows(device: str, *size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def assert_added(
    got: torch.Tensor, before: torch.Tensor, x: torch.Tensor, weights: LoRALayerWeights, plan: LoRAPlan
) -> None:
    """``got`` is ``before`` plus what the plain twin adds in float32, and untouched where that is nothing."""
    exact = reference.add_lora_(before.float().clone(), x.float(), weights, plan)
    row_slots = np.repeat(plan.slots, np.diff(plan.starts))
    known = (row_slots >= 0) & (row_slots < len(weights.rank))
    adapted = np.zeros(len(row_slots), bool)
    adapted[known] = weights.rank[row_slots[known]] > 0
    alone = torch.from_numpy(~adapted).to(got.device)
    assert torch.equal(got[alone], before[alone]), "rows without an adapter changed"
    if not adapted.any():
        return
    got, before, exact = (tensor[~alone] for tensor in (got, before, exact))
    error, added = (got.float() - exact).norm(), (exact - before.float()).norm()
    rounding = (_rounded(exact, got.dtype) - exact).norm()
    assert error <= LIMIT[weights.A.dtype] * added + rounding, f"off by {error} of {added}, rounding {rounding}"


def _rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 numbers as the kernels leave them in ``dtype``, in float32."""
    if dtype == torch.bfloat16 and not exact.is_cuda:
        # Triton's interpreter cuts off what a GPU rounds: twice the error.
        return (exact.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)
    return exact.to(dtype).float()
