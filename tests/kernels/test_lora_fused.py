"""Linears with their adapters in one launch, beside the plain product and the reference of LoRA."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from peft_dist.kernels import reference
from peft_dist.kernels.lora_fused import can_fuse, fused_linear, plain_linear
from peft_dist.kernels.lora_fused_plans import FusedPlan
from peft_dist.kernels.lora_tiles import LoRATiles, max_tiles, write_tiles
from peft_dist.kernels.lora_workspace import LoRAWorkspace
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan
from tests.kernels.lora_cases import DEVICES, LIMIT, layers_of, plan_of_rows, random_rows
from tests.thorough import some_of

pytestmark = pytest.mark.parametrize("device", DEVICES)
IN = 64
# A slot without ranks in a layer, and one of more ranks than are in work at once.
RANKS = [[8, 17, 0, 2, 0], [3, 16, 9, 0, 0], [1, 40, 8, 8, 0]]
SMALL = FusedPlan(block_n=16, block_k=16, split=2, stages=2, each=2, shrink_split=2, shrink_k=16)
LAUNCHES = [
    SMALL,
    replace(SMALL, split=1, shrink_split=1, each=1),
    replace(SMALL, split=4, each=4, shrink_split=3),
    replace(SMALL, tma=True, block_k=32, ahead=True),
    replace(SMALL, split=1, each=1, ahead=True),
]


def plan_of(device: str, slots: np.ndarray, layers: list[LoRALayerWeights], has_base: bool = True) -> LoRAPlan:
    """In tiles some of which are not used, in arrays whose other entries hold anything."""
    room = max_tiles(len(slots), 5, 16, has_base=True) + 1
    arrays = [np.full(size, 12345, np.int32) for size in (room * 16, room, room)]
    write_tiles(slots, *arrays, tile_rows=16, has_base=has_base)
    plan = plan_of_rows(slots)
    plan.tiles = LoRATiles(*(torch.from_numpy(a).to(device) for a in arrays), tile_rows=16, has_base=has_base)
    plan.layers = layers
    return plan


def expected(x: torch.Tensor, weight: torch.Tensor, layers: list[LoRALayerWeights], plan: LoRAPlan) -> torch.Tensor:
    y = x.float() @ weight.float().T
    first = 0
    for layer in layers:
        columns = slice(first, first + layer.B.shape[1])
        y[:, columns] = reference.add_lora_(y[:, columns].clone(), x.float(), layer, plan)
        first = columns.stop
    return y


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("launch", some_of(LAUNCHES))
@pytest.mark.parametrize("outs", [[32], [48, 16], [32, 16, 16]])
@pytest.mark.parametrize("num_rows", some_of([33, 1, 3, 19]))
@pytest.mark.parametrize("dtype", [torch.float16])
def test_as_the_product_and_lora(
    device: str, dtype: torch.dtype, num_rows: int, outs: list[int], launch: FusedPlan
) -> None:
    layers = layers_of(device, RANKS[: len(outs)], IN, outs, dtype, seed=num_rows)
    slots = np.random.default_rng(num_rows).integers(-1, 6, num_rows).astype(np.int32)
    plan = plan_of(device, slots, layers, has_base=num_rows != 19)
    plan.factor = -1.0 if num_rows == 33 else 1.0
    x, weight = (random_rows(device, n, IN, dtype=dtype) for n in (num_rows, sum(outs)))
    assert can_fuse(x, weight, layers, plan, launch)
    layers[0].workspace.take(1 << 16).fill_(float("nan"))
    found = fused_linear(x, weight, layers, plan, launch=launch)
    assert found.shape == (num_rows, sum(outs)) and found.dtype == dtype
    wanted = expected(x, weight, layers, plan)
    assert error(found, wanted) < error(wanted.to(dtype), wanted) + LIMIT[dtype] / 4
    # Counters are as they were before.
    assert not layers[0].workspace.take_counters(1).any()


@pytest.mark.parametrize("launch", LAUNCHES)
def test_the_product_alone(device: str, launch: FusedPlan) -> None:
    x, weight = (random_rows(device, n, IN, dtype=torch.float16) for n in (5, 48))
    found = plain_linear(x, weight, LoRAWorkspace(device), launch=launch)
    wanted = x.float() @ weight.float().T
    assert error(found, wanted) <= error(wanted.to(x.dtype), wanted) + 1e-6


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("launch", LAUNCHES)
def test_with_the_activation(device: str, launch: FusedPlan, activation: str) -> None:
    layers = layers_of(device, RANKS[:2], IN, [32, 32], torch.float16, seed=1)
    slots = np.random.default_rng(1).integers(-1, 6, 19).astype(np.int32)
    plan = plan_of(device, slots, layers)
    x, weight = (random_rows(device, n, IN, dtype=torch.float16) for n in (19, 64))
    weight /= 8
    found = fused_linear(x, weight, layers, plan, launch=launch, activation=activation)
    base = (x.float() @ weight.float().T).split(32, dim=1)
    wanted = reference.lora_gate(*base, x.float(), layers, plan, activation)
    assert found.shape == (19, 32) and error(found, wanted) < error(wanted.half(), wanted) + LIMIT[x.dtype] / 4
    alone = plain_linear(x, weight, LoRAWorkspace(device), launch=launch, activation=activation)
    wanted = reference.lora_gate(*base, x.float(), [None, None], plan, activation)
    assert error(alone, wanted) < error(wanted.half(), wanted) + LIMIT[x.dtype] / 4


@pytest.mark.parametrize("launch", LAUNCHES)
def test_rows_know_nothing_of_others(device: str, launch: FusedPlan) -> None:
    """Not of an input that is no number, nor of what their adapters are, as long as their tiles stay in place."""
    layers = layers_of(device, RANKS[:1], IN, [32], torch.float16, seed=1)
    x, weight = (random_rows(device, n, IN, dtype=torch.float16) for n in (4, 32))
    slots = np.array([0, 1, -1, 3], np.int32)
    alone = fused_linear(x, weight, layers, plan_of(device, slots, layers), launch=launch)
    x[1], x[2] = float("nan"), float("inf")
    slots[3] = 4
    beside = fused_linear(x, weight, layers, plan_of(device, slots, layers), launch=launch)
    assert torch.equal(beside[0], alone[0]) and beside[1].isnan().all() and not torch.equal(beside[3], alone[3])
