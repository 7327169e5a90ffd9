"""The next layer's shrink in a gate's kernel: in the interpreter on tiny shapes, and compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from peft_dist.kernels import reference
from peft_dist.kernels.lora_down import ShrinkInGate, parts_of
from peft_dist.kernels.lora_gate_triton import lora_expand_gate
from peft_dist.kernels.lora_group import group_of, make_tiles
from peft_dist.kernels.lora_plans import GroupPlan
from peft_dist.kernels.lora_tiles import LoRATiles
from peft_dist.kernels.lora_triton import lora_expand_group_, lora_shrink_group
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan
from tests import triton_interpreter
from tests.kernels.lora_cases import DEVICES, assert_added, layers_of, plan_of_rows, random_rows

pytestmark = pytest.mark.parametrize("device", DEVICES)
IN, OUT = 24, 40
# Gate, up and down: several ranks of one slot, none, and more than are in work at once.
RANKS = [[8, 16, 3, 17, 0, 2], [3, 16, 0, 20, 1, 2]], [5, 16, 40, 3, 0, 17]
# Parts of 32 columns, in blocks of 16; the last is not whole.
LAUNCH = GroupPlan(16, 3, 64, gate_loop_n=64, loop_n=64, loop_part=32, loop_stages=2)
WIDTH = 100


def plan_of(slots: np.ndarray, device: str, unused: int = 0, factor: float = 1.0) -> LoRAPlan:
    """With so many tiles more than are used, whose other entries hold anything."""
    plan = plan_of_rows(slots, factor)
    made = make_tiles(slots, torch.device(device), 16, has_base=True)
    rows, others = (torch.full((unused * n,), 12345, dtype=torch.int32, device=device) for n in (16, 1))
    lens = torch.cat([made.lens, torch.zeros_like(others)])
    plan.tiles = LoRATiles(torch.cat([made.rows, rows]), torch.cat([made.slots, others]), lens, 16, has_base=True)
    return plan


class Case:
    def __init__(self, device: str, dtype: torch.dtype = torch.float16) -> None:
        triton_interpreter.mend()
        self.device, self.dtype = device, dtype
        self.gate = layers_of(device, RANKS[0], IN, [WIDTH, WIDTH], dtype, seed=1)
        [self.down] = layers_of(device, [RANKS[1]], WIDTH, [OUT], dtype, seed=2)
        self.down.workspace = self.gate[0].workspace
        assert self.down.workspace is not None
        self.down.workspace.take(1 << 20, 1).fill_(float("nan"))

    def inputs(self, num_rows: int) -> list[torch.Tensor]:
        sizes = IN, 2 * WIDTH, OUT
        return [random_rows(self.device, num_rows, n, dtype=self.dtype, seed=i) for i, n in enumerate(sizes)]

    def run(
        self,
        x: torch.Tensor,
        joint: torch.Tensor,
        y: torch.Tensor,
        plan: LoRAPlan,
        gate: list[LoRALayerWeights | None] | None = None,
        launch: GroupPlan = LAUNCH,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The activation, and down's output with its part added."""
        weights = gate or list(self.gate)
        shrink = ShrinkInGate(self.down, plan, parts_of(WIDTH, launch.gate_loop_n))
        lora_shrink_group(x, weights, plan, launch=launch)
        out = torch.full((plan.num_rows, WIDTH), float("nan"), dtype=self.dtype, device=self.device)
        lora_expand_gate(*joint.split(WIDTH, dim=1), weights, plan, "silu", out, launch=launch, down=shrink)
        y = y.clone()
        lora_expand_group_([y], [self.down], plan, launch=replace(launch, split=shrink.parts), place=1)
        return out, y


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("adapted", [(1, 1), (1, 0), (0, 1)])
@pytest.mark.parametrize("unused", [0, 9])
def test_the_activation_and_what_down_adds(
    device: str, dtype: torch.dtype, adapted: tuple[int, int], unused: int
) -> None:
    case = Case(device, dtype)
    slots = np.random.default_rng(1).permutation([0, 0, 1, 2, 3, 4, 5, 5, -1, -1, 2, 7]).astype(np.int32)
    plan = plan_of(slots, device, unused)
    weights: list[LoRALayerWeights | None] = [
        w if chosen else None for w, chosen in zip(case.gate, adapted, strict=True)
    ]
    x, joint, y = case.inputs(len(slots))
    gated, got = case.run(x, joint, y, plan, weights)
    gate, up = joint.float().split(WIDTH, dim=1)
    exact = reference.lora_gate(gate, up, x, weights, plan)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    assert (gated.float() - exact).norm() <= (1e-3 if dtype == torch.float16 else 6e-3) * exact.norm()
    assert_added(got, y, gated, case.down, plan)


@pytest.mark.parametrize("loop_n", [0, 64])
def test_parts_are_added_by_either_expand_and_taken_away_too(device: str, loop_n: int) -> None:
    case = Case(device)
    slots = np.array([0] * 17 + [2, -1, 3], np.int32)
    plan = plan_of(slots, device, factor=-1.0)
    x, joint, y = case.inputs(len(slots))
    gated, got = case.run(x, joint, y, plan, launch=replace(LAUNCH, loop_n=loop_n))
    assert_added(got, y, gated, case.down, plan)


def test_a_row_gets_the_same_bits_whatever_tiles_are_used(device: str) -> None:
    """With few tiles in use twice as many programs share each."""
    case = Case(device)
    slots = np.array([0, 1, 2, 3, 5, 0, -1], np.int32)
    x, joint, y = case.inputs(len(slots))
    few = case.run(x, joint, y, plan_of(slots, device, unused=25))
    for chosen in ([0, 1, 2, 3, 4, 5, 6], [5, 4, 3, 2, 1, 0], [2], [4, 0]):
        index = torch.tensor(chosen, device=device)
        own = [tensor[index].contiguous() for tensor in (x, joint, y)]
        for whole, part in zip(few, case.run(*own, plan_of(slots[chosen], device)), strict=True):
            assert torch.equal(part, whole[index])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_broken_adapter_and_broken_rows_reach_no_other(device: str) -> None:
    case = Case(device)
    plan = plan_of(np.array([0, 1, 1, 2, -1, 3], np.int32), device)
    x, joint, y = case.inputs(6)
    _, expected = case.run(x, joint, y, plan)
    case.down.A[int(case.down.rows_of(1)[0])] = float("inf")
    joint[5] = float("nan")
    _, got = case.run(x, joint, y, plan)
    assert not torch.isfinite(got[[1, 2, 5]]).any()
    assert torch.equal(got[[0, 3, 4]], expected[[0, 3, 4]])


def test_where_it_is_found(device: str) -> None:
    """In captured steps, for as many parts as the launch plan of the gate gives, if these are not too many."""
    ranks = [[4]]
    gate = layers_of(device, ranks * 2, 16, [2560, 2560], torch.float16, seed=0)
    [down] = layers_of(device, ranks, 2560, [16], torch.float16, seed=0)
    [narrow] = layers_of(device, ranks, 2400, [16], torch.float16, seed=0)
    [wide] = layers_of(device, ranks, 2560, [16], torch.float32, seed=0)
    x = random_rows(device, 40, 16, dtype=torch.float16)
    plan = plan_of(np.zeros(40, np.int32), device, unused=60)
    tiles = plan.tiles
    assert tiles is not None
    launch = group_of(gate).plan(tiles, wide=False)
    found = ShrinkInGate.find(x, gate, down, plan)
    assert found == ShrinkInGate(down, plan, -(-2560 // (launch.gate_loop_n // 2)))
    assert ShrinkInGate.find(x, [None, gate[1]], down, plan) is not None
    for other, rows in ((None, x), (narrow, x), (wide, x), (down, x.float())):
        assert ShrinkInGate.find(rows, gate, other, plan) is None
    changes: list[dict[str, int]] = [{"with_adapter": 1}, {"tile_rows": 32}]
    for change in changes:
        plan.tiles = tiles._replace(**change)
        assert ShrinkInGate.find(x, gate, down, plan) is None
    plan.tiles = LoRATiles(tiles.rows[:16], tiles.slots[:1], tiles.lens[:1], 16, has_base=True)
    assert ShrinkInGate.find(x, gate, down, plan) is None, "programs of one block"


def test_programs_that_do_not_loop_refuse_it(device: str) -> None:
    case = Case(device)
    plan = plan_of(np.zeros(2, np.int32), device)
    joint = case.inputs(2)[1]
    with pytest.raises(ValueError, match="do not loop"):
        shrink = ShrinkInGate(case.down, plan, 4)
        launch = replace(LAUNCH, gate_loop_n=0)
        lora_expand_gate(*joint.split(WIDTH, dim=1), case.gate, plan, launch=launch, down=shrink)
