"""Tiles of a few rows beside longer ones, those of the base and unused ones, in expands of several block sizes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_dist.kernels import reference
from peft_dist.kernels.lora_gate_triton import lora_expand_gate
from peft_dist.kernels.lora_group import make_tiles
from peft_dist.kernels.lora_plans import GroupPlan
from peft_dist.kernels.lora_triton import lora_expand_group_, lora_shrink_group
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan
from tests.kernels.lora_cases import DEVICES, assert_added, layers_of, plan_of_rows, random_rows
from tests.thorough import examples

pytestmark = pytest.mark.parametrize("device", DEVICES)
IN, OUT = 40, 100
RANKS = [[8, 1, 16, 17, 0], [3, 0, 16, 40, 0]]
# Parts within a block, and a sum in as many parts as is no power of two.
LAUNCH = GroupPlan(16, 3, 64, 32, few_rows=3, gate_n=64, gate_part_n=16)
LAUNCHES = st.builds(
    replace,
    st.just(LAUNCH),
    few_rows=st.sampled_from([1, 3, 8]),
    part_n=st.sampled_from([16, 64, 128]),
    gate_part_n=st.sampled_from([16, 32, 128]),
    loop_n=st.sampled_from([0, 64, 192]),
    gate_loop_n=st.sampled_from([0, 32, 64]),
    loop_part=st.just(32),
)
# How many rows each adapter has, and the base.
COUNTS = st.lists(st.integers(0, 6), min_size=6, max_size=6).filter(any)


def plan_of_counts(counts: list[int], device: str) -> LoRAPlan:
    """Rows in an order of no meaning; the last count is the base's."""
    slots = np.repeat(np.array([*range(len(counts) - 1), -1], np.int32), counts)
    plan = plan_of_rows(np.random.default_rng(sum(counts)).permutation(slots))
    slots = np.repeat(plan.slots, np.diff(plan.starts))
    plan.tiles = make_tiles(slots, torch.device(device), 16, has_base=True)
    return plan


@examples(3, 15)
@given(counts=COUNTS, launch=LAUNCHES, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_expands_of_any_numbers_of_rows(device: str, counts: list[int], launch: GroupPlan, dtype: torch.dtype) -> None:
    plan = plan_of_counts(counts, device)
    layers = layers_of(device, RANKS, IN, [OUT, 72], dtype, seed=1)
    x = random_rows(device, plan.num_rows, IN, dtype=dtype)
    ys = [random_rows(device, plan.num_rows, n, dtype=dtype, seed=n) for n in (OUT, 72)]
    before = [y.clone() for y in ys]
    lora_shrink_group(x, layers, plan, launch=launch)
    lora_expand_group_(ys, layers, plan, launch=launch)
    for y, was, weights in zip(ys, before, layers, strict=True):
        assert_added(y, was, x, weights, plan)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@examples(3, 15)
@given(
    counts=COUNTS,
    launch=LAUNCHES,
    adapted=st.sampled_from([(True, True), (True, False), (False, True)]),
    activation=st.sampled_from(["silu", "gelu_tanh"]),
)
def test_gates_of_any_numbers_of_rows(
    device: str, counts: list[int], launch: GroupPlan, adapted: tuple[bool, bool], activation: str
) -> None:
    plan = plan_of_counts(counts, device)
    layers = layers_of(device, RANKS, IN, [OUT, OUT], torch.float16, seed=1)
    weights: list[LoRALayerWeights | None] = [w if chosen else None for w, chosen in zip(layers, adapted, strict=True)]
    x = random_rows(device, plan.num_rows, IN, dtype=torch.float16)
    gate, up = random_rows(device, plan.num_rows, 2 * OUT, dtype=torch.float16, seed=2).split(OUT, dim=1)
    exact = reference.lora_gate(gate.float(), up.float(), x, weights, plan, activation)
    out = torch.full((plan.num_rows, OUT), float("nan"), dtype=torch.float16, device=device)
    lora_shrink_group(x, weights, plan, launch=launch)
    lora_expand_gate(gate, up, weights, plan, activation, out, launch=launch)
    assert (out.float() - exact).norm() <= 1e-3 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_bits_beside_few_or_no_others_of_its_adapter(device: str, dtype: torch.dtype) -> None:
    layers = layers_of(device, RANKS, IN, [OUT, OUT], dtype, seed=4)
    row = random_rows(device, 1, IN, dtype=dtype)
    gate, up = random_rows(device, 1, 2 * OUT, dtype=dtype, seed=2).split(OUT, dim=1)
    results = []
    for companions in range(LAUNCH.few_rows):
        plan = plan_of_counts([companions, 0, 1 + companions, 0, 1, 2], device)
        at = np.flatnonzero(np.repeat(plan.slots, np.diff(plan.starts)) == 2)[-1]
        owns = (row, gate, up)
        tensors = [random_rows(device, plan.num_rows, own.shape[1], dtype=dtype, seed=companions) for own in owns]
        for tensor, own in zip(tensors, owns, strict=True):
            tensor[at] = own[0]
        x, *ys = tensors
        lora_shrink_group(x, layers, plan, launch=LAUNCH)
        gated = lora_expand_gate(*ys, layers, plan, launch=LAUNCH)
        lora_expand_group_(ys, layers, plan, launch=LAUNCH)
        results.append(torch.stack([gated[at], *(y[at] for y in ys)]))
    for result in results[1:]:
        assert torch.equal(result, results[0])
