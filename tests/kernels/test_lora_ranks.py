"""Adapters of high ranks in decode steps: ranks shared out in the shrink, all of them in work at once in the expand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from peft_dist.kernels import reference
from peft_dist.kernels.lora_gate_triton import lora_expand_gate
from peft_dist.kernels.lora_group import group_of
from peft_dist.kernels.lora_lookup_triton import Lookup, lookup_of, ranks_of
from peft_dist.kernels.lora_plans import GroupPlan
from peft_dist.kernels.lora_triton import lora_expand_group_, lora_shrink_group
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan
from tests import triton_interpreter
from tests.kernels.lora_cases import DEVICES, LIMIT, assert_added, layers_of, random_rows
from tests.kernels.test_lora_fused import plan_of
from tests.thorough import some_of

pytest.importorskip("triton")
pytestmark = pytest.mark.parametrize("device", DEVICES)
IN, OUTS = 40, [52, 33]
# The second adapter has more ranks than any launch is for, the last one does not adapt one of the layers.
RANKS = [[8, 130, 64, 0], [16, 128, 33, 5]]
SLOTS = np.array([1, 0, 2, 2, -1, 3, 1, 2, 0, 2], np.int32)
# Ranks that a program has in work, who shares those of a shrink, and outputs for how many.
USUAL = GroupPlan(16, 2, 64, loop_n=32, gate_loop_n=32, loop_part=16, loop_stages=2)
LAUNCHES = [
    replace(USUAL, ranks=64, rank_parts=4, loop_shares=2, gate_loop_shares=4),
    replace(USUAL, ranks=128, rank_parts=8, split=1, loop_shares=4, gate_loop_shares=2),
    replace(USUAL, ranks=32, rank_parts=2, split=3, loop_n=64, gate_loop_n=64, loop_part=32),
    replace(USUAL, ranks=128, rank_parts=3),
]


@pytest.fixture(autouse=True)
def mended() -> None:
    triton_interpreter.mend()


@pytest.mark.parametrize("looked_up", [True, False])
@pytest.mark.parametrize("launch", some_of(LAUNCHES))
def test_launches_for_many_ranks_add_what_the_twin_adds(device: str, launch: GroupPlan, looked_up: bool) -> None:
    layers = layers_of(device, RANKS, IN, OUTS, torch.float16, seed=1)
    # Of all tiles used, and of few: then twice as many programs share each.
    for slots in (SLOTS, SLOTS[:1], SLOTS[1:3]):
        plan = plan_of(device, slots, layers)
        plan.layers = layers if looked_up else []
        x = random_rows(device, len(slots), IN, dtype=torch.float16)
        ys = [random_rows(device, len(slots), n, dtype=torch.float16, seed=n) for n in OUTS]
        before = [y.clone() for y in ys]
        lora_shrink_group(x, layers, plan, launch=launch)
        lora_expand_group_(ys, layers, plan, launch=launch)
        for y, was, weights in zip(ys, before, layers, strict=True):
            assert_added(y, was, x, weights, plan)
        parts = [torch.full_like(y, float("nan")) for y in ys]
        lora_expand_group_(parts, layers, plan, adds=False, launch=launch)
        for part, weights in zip(parts, layers, strict=True):
            exact = reference.add_lora_(torch.zeros_like(part, dtype=torch.float32), x.float(), weights, plan)
            assert part[exact.eq(0).all(1)].eq(0).all(), "rows without an adapter have a part"
            assert (part.float() - exact).norm() <= 2 * LIMIT[torch.float16] * exact.norm()


@pytest.mark.parametrize("adapted", some_of([(True, True), (True, False), (False, True)]))
@pytest.mark.parametrize("launch", some_of(LAUNCHES))
def test_gates_for_many_ranks(device: str, launch: GroupPlan, adapted: tuple[bool, bool]) -> None:
    width = OUTS[0]
    layers = layers_of(device, RANKS, IN, [width, width], torch.float16, seed=2)
    weights: list[LoRALayerWeights | None] = [w if is_one else None for w, is_one in zip(layers, adapted, strict=True)]
    for slots in (SLOTS, SLOTS[:1]):
        plan = plan_of(device, slots, layers)
        x = random_rows(device, len(slots), IN, dtype=torch.float16)
        gate, up = random_rows(device, len(slots), 2 * width, dtype=torch.float16, seed=2).split(width, dim=1)
        exact = reference.lora_gate(gate.float(), up.float(), x, weights, plan, "silu")
        out = torch.full((len(slots), width), float("nan"), dtype=torch.float16, device=device)
        lora_shrink_group(x, weights, plan, launch=launch)
        lora_expand_gate(gate, up, weights, plan, "silu", out, launch=launch)
        assert (out.float() - exact).norm() <= 1e-3 * exact.norm()


@pytest.mark.parametrize("ranks", [[[64, 64, 40]], [[8, 16, 64, 128]], [[200, 8, 1]]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_plans_of_captured_steps_follow_the_highest_rank(
    device: str, ranks: list[list[int]], dtype: torch.dtype
) -> None:
    highest = max(ranks[0])
    layers = layers_of(device, ranks, 600, [520], dtype, seed=3)
    workspace = layers[0].workspace
    assert workspace is not None and workspace.ranks == min(highest, 128)
    slots = np.arange(9, dtype=np.int32) % len(ranks[0])
    plan = plan_of(device, slots, layers)
    assert plan.tiles is not None
    known = ranks_of(workspace, looked_up(plan, layers))
    launch = group_of(layers).plan(plan.tiles, dtype == torch.float32, None, known)
    assert launch.rank_parts == workspace.ranks // 16
    assert (launch.loop_n > 0) == (dtype != torch.float32)
    x, y = (random_rows(device, len(slots), n, dtype=dtype) for n in (600, 520))
    before = y.clone()
    lora_shrink_group(x, layers, plan)
    lora_expand_group_([y], layers, plan)
    assert_added(y, before, x, layers[0], plan)


def test_other_launches_keep_theirs(device: str) -> None:
    """Whatever adapters come: each plan is a kernel that somebody would wait for."""
    layers = layers_of(device, [[64, 8]], 600, [520], torch.bfloat16, seed=3)
    plan = plan_of(device, np.array([0, 1], np.int32), layers)
    assert plan.tiles is not None
    plan.layers = []
    workspace = layers[0].workspace
    assert workspace is not None and workspace.ranks == 64
    assert ranks_of(workspace, looked_up(plan, layers)) == 16
    assert group_of(layers).plan(plan.tiles, False).rank_parts == 1


def test_a_launch_made_for_few_ranks_is_right_for_more(device: str) -> None:
    """A captured step that nobody captured again is slow, not wrong."""
    layers = layers_of(device, [[8, 72]], IN, OUTS[:1], torch.float16, seed=4)
    plan = plan_of(device, np.array([1, 0, 1, -1], np.int32), layers)
    x, y = (random_rows(device, 4, n, dtype=torch.float16) for n in (IN, OUTS[0]))
    before = y.clone()
    lora_shrink_group(x, layers, plan, launch=USUAL)
    lora_expand_group_([y], layers, plan, launch=USUAL)
    assert_added(y, before, x, layers[0], plan)


def looked_up(plan: LoRAPlan, layers: list[LoRALayerWeights]) -> Lookup | None:
    assert plan.tiles is not None and layers[0].workspace is not None
    return lookup_of(plan, plan.tiles, layers, layers[0].workspace.max_rank)
