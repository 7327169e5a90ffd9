"""The Triton LoRA kernels against the plain twin: in the interpreter on tiny shapes, and compiled on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_dist.kernels import lora
from peft_dist.kernels.types import LoRAPlan
from tests.kernels.lora_cases import (
    DEVICES,
    POPULARITIES,
    SHARED_SLOT_RANKS,
    assert_added,
    layers_of,
    plan_of_rows,
    popularity,
    random_rows,
)

pytest.importorskip("triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.parametrize("device", DEVICES)


def sizes_on(device: str) -> tuple[int, list[int]]:
    """Inputs, and outputs of three layers: no multiples of a block."""
    return (40, [24, 33, 5]) if device == "cpu" else (4100, [4096, 1030, 5])


def check_group(
    device: str,
    ranks: list[list[int]],
    sizes: tuple[int, list[int]],
    plan: LoRAPlan,
    dtype: torch.dtype,
    pool_dtype: torch.dtype | None = None,
) -> None:
    """Outputs are columns of one wide tensor, which has more columns than that."""
    in_features, outs = sizes
    layers = layers_of(device, ranks, in_features, outs, pool_dtype or dtype, seed=3)
    x = random_rows(device, plan.num_rows, in_features, dtype=dtype, seed=1)
    wide = random_rows(device, plan.num_rows, sum(outs) + 3, dtype=dtype, seed=2)
    before = wide.clone()
    lora.add_lora_group_(wide[:, : sum(outs)].split(outs, dim=1), x, layers, plan)
    split = zip(wide[:, :-3].split(outs, dim=1), before[:, :-3].split(outs, dim=1), layers, strict=True)
    for got, untouched, weights in split:
        assert_added(got, untouched, x, weights, plan)
    assert torch.equal(wide[:, -3:], before[:, -3:]), "wrote outside of y"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", POPULARITIES)
def test_popularities(device: str, kind: str, dtype: torch.dtype) -> None:
    num_rows = 21 if device == "cpu" else 133
    ranks = [[8, 1, 16, 0, 20], [8, 4, 0, 3, 20], [0, 1, 17, 3, 8]]
    if device == "cuda":
        ranks = [list(SHARED_SLOT_RANKS), list(reversed(SHARED_SLOT_RANKS)), [128, 64, 0, 16, 8, 4, 1, 33]]
    plan = plan_of_rows(popularity(kind, num_rows, len(ranks[0]), seed=5))
    check_group(device, ranks, sizes_on(device), plan, dtype)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 33, 133])
def test_awkward_numbers_of_rows(device: str, num_rows: int) -> None:
    ranks, outs = [[8, 3], [4, 16]], [24, 33] if device == "cpu" else [1030, 4096]
    plan = plan_of_rows(popularity("skewed", num_rows, 2, seed=num_rows))
    check_group(device, ranks, (40, outs), plan, torch.float16)


@pytest.mark.parametrize("rank", [1, 4, 8, 16, 64, 128])
def test_ranks(device: str, rank: int) -> None:
    in_features, outs = (40, [24]) if device == "cpu" else (4096, [4096])
    check_group(device, [[rank, 2]], (in_features, outs), plan_of_rows(np.array([0, 1, 0, -1])), torch.float16)


@pytest.mark.parametrize(
    ("dtype", "pool_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_adapters_of_another_type(device: str, dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    plan = plan_of_rows(np.array([1, 0, -1, 0, 1]))
    check_group(device, [[8, 17], [3, 0], [1, 2]], sizes_on(device), plan, dtype, pool_dtype)
