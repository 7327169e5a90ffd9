"""Tables looked up for all tiles at once: the same entries, and the same bits of every kernel that reads them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from peft_dist.kernels import lora
from peft_dist.kernels.lora_lookup_triton import lookup_of
from peft_dist.kernels.lora_plans import GroupPlan
from peft_dist.kernels.lora_tiles import LoRATiles, max_tiles, write_tiles
from peft_dist.kernels.lora_triton import lora_expand_group_, lora_shrink_group
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan
from tests import triton_interpreter
from tests.kernels.lora_cases import DEVICES, assert_added, layers_of, plan_of_rows, random_rows

pytestmark = pytest.mark.parametrize("device", DEVICES)
IN, OUTS = 24, [48, 16, 16]
# A slot without ranks in a layer, one of more ranks than are in work at once, and one of none anywhere.
RANKS = [[8, 17, 0, 2, 0], [3, 16, 9, 0, 0], [1, 40, 8, 8, 0]]
SLOTS = np.array([0, 1, 1, -1, 3, 2, 0, 4, 9, 3], np.int32)
ROOM = max_tiles(len(SLOTS), 5, 16, has_base=True) + 3
LAUNCHES = [
    GroupPlan(16, 2, 64, 32, few_rows=1, gate_n=64, gate_part_n=16),
    GroupPlan(16, 2, 64, 32, few_rows=8, gate_n=64, gate_part_n=16),
    GroupPlan(16, 2, 64, gate_loop_n=64, loop_n=64, loop_part=32, loop_stages=2),
]


def plan_of(device: str, layers: list[LoRALayerWeights]) -> LoRAPlan:
    """In tiles some of which are not used, in arrays whose other entries hold anything."""
    arrays = [np.full(size, 12345, np.int32) for size in (ROOM * 16, ROOM, ROOM)]
    write_tiles(SLOTS, *arrays, tile_rows=16, has_base=True)
    plan = plan_of_rows(SLOTS)
    plan.tiles = LoRATiles(*(torch.from_numpy(a).to(device) for a in arrays), tile_rows=16, has_base=True)
    plan.layers = layers
    return plan


@pytest.mark.parametrize("cpu_tables", [False, True])
def test_entries_are_those_of_each_tiles_slot(device: str, cpu_tables: bool) -> None:
    layers = layers_of(device, RANKS, IN, OUTS, torch.float16, seed=1, cpu_tables=cpu_tables)
    plan = plan_of(device, layers)
    tiles = plan.tiles
    assert tiles is not None
    found = lookup_of(plan, tiles, layers[1:], 64)
    assert found is not None and lookup_of(plan, tiles, layers[:1], 64) is found
    for weights in layers:
        tables = found.tables_of(weights)
        for tile, (slot, length) in enumerate(zip(tiles.slots.tolist(), tiles.lens.tolist(), strict=True)):
            is_there = length > 0 and 0 <= slot < len(weights.rank)
            rank = int(weights.rank[slot]) if is_there else 0
            assert int(tables.rank[tile]) == rank
            assert float(tables.scaling[tile]) == (float(weights.scaling[slot]) if is_there else 0.0)
            count = -(-rank // weights.page_rows)
            assert tables.pages[tile, :count].tolist() == weights.pages[slot if is_there else 0, :count].tolist()


def test_a_plan_of_other_layers_is_not_used(device: str) -> None:
    layers = layers_of(device, RANKS, IN, OUTS, torch.float16, seed=1)
    plan = plan_of(device, layers[:2])
    assert plan.tiles is not None
    assert lookup_of(plan, plan.tiles, layers[:2], 64) is not None
    assert lookup_of(plan, plan.tiles, layers, 64) is None
    plan = plan_of(device, [])
    assert plan.tiles is not None and lookup_of(plan, plan.tiles, layers, 64) is None


def test_adapters_that_come_later_are_seen_by_later_passes(device: str) -> None:
    layers = layers_of(device, RANKS[:1], IN, OUTS[:1], torch.float16, seed=1)
    x, y = (random_rows(device, len(SLOTS), n, dtype=torch.float16) for n in (IN, OUTS[0]))
    for turn in range(2):
        plan = plan_of(device, layers)
        assert_added(lora.add_lora_(y.clone(), x, layers[0], plan), y, x, layers[0], plan)
        if not turn and layers[0].rank_t is None:
            layers[0].scaling[:] *= 2
            layers[0].version += 1
        elif not turn:
            assert layers[0].scaling_t is not None
            layers[0].scaling[:] *= 2
            layers[0].scaling_t *= 2


def check(device: str, run: Callable[[LoRAPlan], list[torch.Tensor]], layers: list[LoRALayerWeights]) -> None:
    by_tile, by_slot = (run(plan_of(device, some)) for some in (layers, []))
    for one, other in zip(by_tile, by_slot, strict=True):
        assert torch.equal(one.nan_to_num(77), other.nan_to_num(77))


@pytest.mark.parametrize("launch", LAUNCHES)
def test_expands(device: str, launch: GroupPlan) -> None:
    triton_interpreter.mend()
    layers = layers_of(device, RANKS, IN, OUTS, torch.float16, seed=1)
    x, joint = (random_rows(device, len(SLOTS), n, dtype=torch.float16) for n in (IN, sum(OUTS)))

    def run(plan: LoRAPlan) -> list[torch.Tensor]:
        ys = list(joint.clone().split(OUTS, dim=1))
        lora_shrink_group(x, layers, plan, launch=launch)
        lora_expand_group_(ys, layers, plan, launch=launch)
        return ys

    check(device, run, layers)
    before = joint.split(OUTS, dim=1)
    for got, was, weights in zip(run(plan_of(device, layers)), before, layers, strict=True):
        assert_added(got, was, x, weights, plan_of_rows(SLOTS))


@pytest.mark.parametrize(
    "launch", [LAUNCHES[0], *(pytest.param(launch, marks=pytest.mark.slow) for launch in LAUNCHES[1:])]
)
def test_gates(device: str, launch: GroupPlan) -> None:
    triton_interpreter.mend()
    from peft_dist.kernels.lora_gate_triton import lora_expand_gate

    layers = layers_of(device, RANKS[:2], IN, [100, 100], torch.float16, seed=1)
    x, joint = (random_rows(device, len(SLOTS), n, dtype=torch.float16) for n in (IN, 200))

    def run(plan: LoRAPlan, weights: list[LoRALayerWeights | None]) -> list[torch.Tensor]:
        lora_shrink_group(x, weights, plan, launch=launch)
        out = torch.full((len(SLOTS), 100), float("nan"), dtype=x.dtype, device=device)
        lora_expand_gate(*joint.split(100, dim=1), weights, plan, out=out, launch=launch)
        return [out]

    chosen: list[LoRALayerWeights | None]
    for chosen in ([*layers], [None, layers[1]], [layers[0], None]):
        check(device, lambda plan, chosen=chosen: run(plan, chosen), layers)  # type: ignore[misc]
