"""Layers of a step of few rows by our products, and those that compute as they always do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from peft_dist.forward_context import ForwardContext
from peft_dist.kernels.few_rows import FewRows
from peft_dist.patches.joined_linear import join_linears, joint_of
from peft_dist.patches.lora_apart import run_gated
from peft_dist.patches.lora_layers import SelectiveLinear, join_siblings
from peft_dist.patches.merged_layers import MergedLayers, twin_of
from peft_dist.patches.together import call_together
from tests import triton_interpreter
from tests.kernels.lora_cases import DEVICES, layers_of, random_rows
from tests.kernels.test_few_rows import small
from tests.kernels.test_lora_fused import plan_of

pytest.importorskip("triton")
pytestmark = pytest.mark.parametrize("device", DEVICES)
IN, WIDTH = 64, 32
SLOTS = np.array([2, -1, 0, 0, 1, 0, -1, 2], np.int32)
HALF = {"rtol": 4e-3, "atol": 4e-3}


class Counted(FewRows):
    """Knows how often it computed something."""

    def __init__(self, device: str) -> None:
        super().__init__(device, small)
        self.count = 0

    def multiply(self, *args: Any) -> torch.Tensor | None:
        return self._count(super().multiply(*args))

    def add_lora(self, *args: Any) -> torch.Tensor | None:
        return self._count(super().add_lora(*args))

    def _count(self, found: torch.Tensor | None) -> torch.Tensor | None:
        self.count += found is not None
        return found


class Layers(nn.Module):
    """Siblings, named as find_siblings knows them, that are joined and wrapped as in a fused model on a GPU."""

    def __init__(self, device: str, wrapped: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = {"device": device, "dtype": torch.float16, "bias": False}
        self.gate_proj, self.up_proj = nn.Linear(IN, WIDTH, **made), nn.Linear(IN, WIDTH, **made)  # type: ignore[arg-type]
        assert join_linears([self.gate_proj, self.up_proj])
        if wrapped:
            self.gate_proj, self.up_proj = (SelectiveLinear.wrap(layer) for layer in (self.gate_proj, self.up_proj))  # type: ignore[assignment]
            self.gate_proj.lora_index, self.up_proj.lora_index = 0, 1  # type: ignore[assignment]
            join_siblings(self)

    def outputs(self, x: torch.Tensor, context: ForwardContext) -> list[torch.Tensor]:
        with torch.inference_mode(), context:
            return [self.gate_proj(x), self.up_proj(x)]

    def gated(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor | None:
        with torch.inference_mode(), context:
            return run_gated(self.gate_proj, self.up_proj, x, "silu")


def context_of(device: str, few: FewRows | None, *, adapted: bool = True) -> ForwardContext:
    triton_interpreter.mend()
    if not adapted:
        return ForwardContext(few_rows=few)
    weights = layers_of(device, [[3, 0, 9], [2, 4, 0]], IN, [WIDTH] * 2, torch.float16, seed=1)
    plan = plan_of(device, SLOTS, weights)
    plan.fuses = True
    return ForwardContext(lora=plan, lora_weights=weights, few_rows=few)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_outputs_are_those_of_the_usual_way(device: str, adapted: bool, wrapped: bool) -> None:
    if adapted and not wrapped:
        pytest.skip("adapters need layers around the linears")
    layers, x = Layers(device, wrapped), random_rows(device, 1, len(SLOTS), IN, dtype=torch.float16)
    few = Counted(device)
    usual = layers.outputs(x, context_of(device, None, adapted=adapted))
    for found, wanted in zip(layers.outputs(x, context_of(device, few, adapted=adapted)), usual, strict=True):
        torch.testing.assert_close(found, wanted, **HALF)
    # Joined layers that nothing is around of are asked one by one.
    assert few.count == wrapped
    gated = layers.gated(x, context_of(device, few, adapted=adapted))
    assert gated is not None and few.count == 1 + wrapped
    torch.testing.assert_close(gated, nn.functional.silu(usual[0]) * usual[1], **HALF)


def test_merged_weights_are_multiplied_with(device: str) -> None:
    layers, x = Layers(device), random_rows(device, 1, len(SLOTS), IN, dtype=torch.float16)
    joint = joint_of(layers.gate_proj.base_layer)  # type: ignore[arg-type]
    assert joint is not None
    merged = random_rows(device, 2 * WIDTH, IN, dtype=torch.float16, seed=5) / 8
    few = Counted(device)
    context = context_of(device, few, adapted=False)
    context.merged = MergedLayers(joined={joint: merged})
    found = torch.cat(layers.outputs(x, context), dim=-1)
    assert few.count == 1
    torch.testing.assert_close(found, nn.functional.linear(x, merged), **HALF)


def test_a_merged_twin_of_a_layer_alone(device: str) -> None:
    x, few = random_rows(device, 1, 3, IN, dtype=torch.float16), Counted(device)
    linear = nn.Linear(IN, WIDTH, bias=False, device=device, dtype=torch.float16)
    layer, twin = SelectiveLinear.wrap(linear), twin_of(linear, torch.randn_like(linear.weight) / 8)
    context = context_of(device, few, adapted=False)
    context.merged = MergedLayers(twins={linear: twin})
    with torch.inference_mode(), context:
        found = layer(x)
    assert few.count == 1
    torch.testing.assert_close(found, nn.functional.linear(x, twin.weight), **HALF)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: linear.register_forward_hook(lambda module, args, output: None),
        lambda linear: linear.register_forward_pre_hook(lambda module, args: None),
        lambda linear: linear.__dict__.update(forward=linear.forward),
        lambda linear: setattr(linear, "bias", nn.Parameter(torch.ones_like(linear.weight[:, 0]))),
        lambda linear: setattr(linear, "__class__", type("Other", (nn.Linear,), {})),
    ],
)
def test_layers_that_do_more_are_called(device: str, change: Callable[[nn.Linear], None]) -> None:
    x, few = random_rows(device, 1, 3, IN, dtype=torch.float16), Counted(device)
    linear = nn.Linear(IN, WIDTH, bias=False, device=device, dtype=torch.float16)
    with torch.inference_mode(), context_of(device, few, adapted=False):
        call_together([linear], x)
        assert few.count == 1
    change(linear)
    with torch.inference_mode(), context_of(device, few, adapted=False):
        torch.testing.assert_close(call_together([linear], x)[0], nn.Linear.forward(linear, x))
    assert few.count == 1


def test_gradients_and_other_passes_are_torchs(device: str) -> None:
    x, few = random_rows(device, 1, 3, IN, dtype=torch.float16), Counted(device)
    linear = nn.Linear(IN, WIDTH, bias=False, device=device, dtype=torch.float16)
    with context_of(device, few, adapted=False):
        assert call_together([linear], x)[0].requires_grad
    with torch.inference_mode():
        call_together([linear], x)
    assert few.count == 0
