"""A gated MLP's two adapted layers and its activation in one pass, and when they stay three."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from peft_dist.forward_context import ForwardContext
from peft_dist.kernels import reference
from peft_dist.kernels.lora_group import make_tiles
from peft_dist.kernels.types import LoRAPlan
from peft_dist.patches import lora_layers
from peft_dist.patches.lora_apart import run_gated
from peft_dist.patches.lora_layers import SelectiveLinear, join_siblings
from tests import triton_interpreter
from tests.kernels.lora_cases import DEVICES, layers_of, plan_of_rows, random_rows

pytest.importorskip("triton")
pytestmark = pytest.mark.parametrize("device", DEVICES)
IN, WIDTH, SLOTS = 24, 40, np.array([2, -1, 0, 0, 1, 0, -1, 2], np.int32)


class Gated(nn.Module):
    """What FusedMLP has of an MLP."""

    def __init__(self, device: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate_proj, self.up_proj = (SelectiveLinear.wrap(nn.Linear(IN, WIDTH, device=device)) for _ in range(2))
        self.gate_proj.lora_index, self.up_proj.lora_index = 0, 1
        join_siblings(self)

    def run(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor | None:
        with torch.inference_mode(), context:
            return run_gated(self.gate_proj, self.up_proj, x, "silu")


@pytest.fixture
def context(device: str) -> ForwardContext:
    triton_interpreter.mend()
    weights = layers_of(device, [[3, 0, 9], [2, 4, 0]], IN, [WIDTH] * 2, torch.float32, seed=1)
    plan = plan_of_rows(SLOTS)
    plan.tiles = make_tiles(SLOTS, torch.device(device), 16, has_base=True)
    return ForwardContext(lora=plan, lora_weights=weights)


@pytest.mark.parametrize("corrected", [False, True])
def test_parts_of_all_plans_are_added_before_the_activation(
    device: str, context: ForwardContext, corrected: bool
) -> None:
    mlp, x = Gated(device), random_rows(device, len(SLOTS), IN, dtype=torch.float32)
    wide = [layer.base_layer(x) for layer in (mlp.gate_proj, mlp.up_proj)]
    plan = context.lora
    assert isinstance(plan, LoRAPlan)
    if corrected:
        taken = np.where(SLOTS == 0, -1, 0).astype(np.int32)
        context.lora_correction = correction = plan_of_rows(taken, factor=-1.0)
        correction.tiles = make_tiles(taken, torch.device(device), 16, has_base=True)
        for y, weights in zip(wide, context.lora_weights, strict=True):
            reference.add_lora_(y.detach(), x, weights, correction)
    expected = reference.lora_gate(*(y.detach() for y in wide), x, context.lora_weights, plan)
    torch.testing.assert_close(mlp.run(x, context), expected, rtol=2e-5, atol=2e-5)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: None)


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: None)


@pytest.mark.parametrize(
    "change",
    [
        lambda mlp, context: hook(mlp.up_proj),
        lambda mlp, context: pre_hook(mlp.gate_proj),
        lambda mlp, context: hook(mlp.gate_proj.base_layer),
        lambda mlp, context: mlp.up_proj.__dict__.update(forward=mlp.up_proj.forward),
        lambda mlp, context: mlp.gate_proj.__dict__.update(siblings=()),
        lambda mlp, context: setattr(mlp, "up_proj", mlp.up_proj.base_layer),
        lambda mlp, context: setattr(context, "lora", None),
        lambda mlp, context: setattr(context.lora, "backend", "torch"),
        lambda mlp, context: setattr(context.lora, "tiles", context.lora.tiles._replace(has_base=False)),
        lambda mlp, context: mlp.gate_proj.__dict__.update(lora_index=-1) or mlp.up_proj.__dict__.update(lora_index=-1),
    ],
)
def test_where_it_cannot_be_nothing_is_computed(
    device: str,
    context: ForwardContext,
    change: Callable[[Gated, ForwardContext], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mlp, x = Gated(device), random_rows(device, len(SLOTS), IN, dtype=torch.float32)
    assert mlp.run(x, context) is not None
    change(mlp, context)
    monkeypatch.delattr(lora_layers, "call_together")
    assert mlp.run(x, context) is None
