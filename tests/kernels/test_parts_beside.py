"""Adapters' parts alone, computed beside products, for kernels that add them later."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from peft_dist.kernels import reference
from peft_dist.kernels.lora_group import make_tiles
from peft_dist.kernels.lora_parts_beside import PartsBeside
from peft_dist.kernels.lora_plans import GroupPlan
from peft_dist.kernels.lora_triton import lora_expand_group_, lora_shrink_group
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan
from tests import triton_interpreter
from tests.kernels.lora_cases import DEVICES, LIMIT, POPULARITIES, layers_of, plan_of_rows, popularity, random_rows
from tests.kernels.test_lora_fused import plan_of
from tests.thorough import some_of

pytest.importorskip("triton")
pytestmark = pytest.mark.parametrize("device", DEVICES)
RANKS = [[8, 1, 16, 0, 20], [8, 4, 0, 3, 20], [0, 1, 17, 3, 8]]
IN, OUTS = 40, [24, 33, 16]
LOOP = GroupPlan(16, 2, 64, 32, loop_n=32, loop_part=16, loop_stages=2)
ROWS = GroupPlan(16, 2, 64, 32, few_rows=3, gate_n=64, gate_part_n=16)


@pytest.fixture(autouse=True)
def mended() -> None:
    triton_interpreter.mend()


def assert_parts(parts: list[torch.Tensor], x: torch.Tensor, layers: list[LoRALayerWeights], plan: LoRAPlan) -> None:
    """What the plain twin adds to zeros, and nothing where it adds nothing."""
    for part, weights in zip(parts, layers, strict=True):
        exact = reference.add_lora_(torch.zeros_like(part, dtype=torch.float32), x.float(), weights, plan)
        assert part[exact.eq(0).all(1)].eq(0).all(), "rows without an adapter have a part"
        limit = (LIMIT[weights.A.dtype] + torch.finfo(part.dtype).eps) * exact.norm()
        assert (part.float() - exact).norm() <= limit


@pytest.mark.parametrize("kind", some_of(POPULARITIES))
@pytest.mark.parametrize("launch", [LOOP, ROWS, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_outputs_become_the_parts_whatever_they_held(
    device: str, dtype: torch.dtype, launch: GroupPlan | None, kind: str
) -> None:
    if dtype == torch.float32 and launch is LOOP:
        launch = replace(LOOP, loop_n=0)
    layers = layers_of(device, RANKS, IN, OUTS, dtype, seed=1)
    for num_rows in (1, 7, 21):
        slots = popularity(kind, num_rows, 5, seed=num_rows)
        plan = plan_of(device, np.where(slots < 5, slots, -1).astype(np.int32), layers)
        plan.layers = []
        x = random_rows(device, num_rows, IN, dtype=dtype)
        parts = list(torch.full((num_rows, sum(OUTS)), float("nan"), dtype=dtype, device=device).split(OUTS, dim=1))
        lora_shrink_group(x, layers, plan, launch=launch)
        lora_expand_group_(parts, layers, plan, adds=False, launch=launch)
        assert_parts(parts, x, layers, plan)


def test_outputs_are_those_without_the_parts(device: str) -> None:
    layers = layers_of(device, RANKS, IN, OUTS, torch.float16, seed=2)
    plan = plan_of(device, np.array([2, -1, 0, 4, 1], np.int32), layers)
    plan.layers = []
    weight = random_rows(device, sum(OUTS), IN, dtype=torch.float16)
    beside = PartsBeside(device, most_rows=5)
    for turn in range(4):
        x = random_rows(device, 1, 5, IN, dtype=torch.float16, seed=turn)
        assert beside.takes(x, layers, plan)
        outputs, parts = beside.compute(x, layers, plan, lambda x=x: (x @ weight.T).split(OUTS, dim=-1))  # type: ignore[misc]
        torch.testing.assert_close(torch.cat([*outputs], dim=-1), x @ weight.T, rtol=4e-3, atol=4e-3)
        assert [part.shape for part in parts] == [output.shape for output in outputs]
        assert_parts([part[0] for part in parts], x[0], layers, plan)


def test_what_is_not_taken(device: str) -> None:
    layers = layers_of(device, RANKS, IN, OUTS, torch.float16, seed=3)
    slots = np.array([0, 1, -1], np.int32)
    x = random_rows(device, 3, IN, dtype=torch.float16)
    beside = PartsBeside(device, most_rows=3)
    whole = plan_of(device, slots, layers)
    assert beside.takes(x, layers, whole)
    assert not PartsBeside(device, most_rows=2).takes(x, layers, whole)
    assert not beside.takes(x, [layers[0], None, layers[2]], whole)
    without_base = plan_of_rows(slots)
    without_base.tiles = make_tiles(slots, torch.device(device), 16)
    assert not beside.takes(x, layers, without_base)
    of_torch = replace(whole, backend="torch")
    assert not beside.takes(x, layers, of_torch)
    lora_shrink_group(x, layers, without_base)
    with pytest.raises(ValueError, match="has_base=True"):
        lora_expand_group_(
            [random_rows(device, 3, n, dtype=torch.float16) for n in OUTS], layers, without_base, adds=False
        )
