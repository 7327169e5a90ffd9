"""q/k/v's adapters in the rotary embedding's pass, and when they stay apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from peft_dist.forward_context import ForwardContext
from peft_dist.kernels import lora_plans, reference, reference_glue
from peft_dist.kernels.lora_group import make_tiles
from peft_dist.kernels.lora_plans import default_plan
from peft_dist.kernels.types import KVCache, LoRAPlan
from peft_dist.patches import lora_fused
from peft_dist.patches.joined_linear import join_linears
from peft_dist.patches.lora_fused import run_rotary
from peft_dist.patches.lora_layers import SelectiveLinear, join_siblings
from tests import triton_interpreter
from tests.kernels.lora_cases import DEVICES, layers_of, plan_of_rows, random_rows

pytest.importorskip("triton")
pytestmark = pytest.mark.parametrize("device", DEVICES)
IN, DIM, HEADS, KV_HEADS = 24, 8, 2, 1
SLOTS = np.array([2, -1, 0, 0, 1, 0, -1, 2], np.int32)
NAMES = ("q_proj", "k_proj", "v_proj")


class Projections(nn.Module):
    """What FusedAttention has of an attention module, with joint weights; ``adapted``: the names of those layers."""

    def __init__(self, device: str, adapted: tuple[str, ...] = NAMES) -> None:
        super().__init__()
        torch.manual_seed(0)
        outs = (HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM)
        linears = [nn.Linear(IN, out, device=device, bias=False) for out in outs]
        join_linears(linears)
        for index, (name, linear) in enumerate(zip(NAMES, linears, strict=True)):
            layer = SelectiveLinear.wrap(linear) if name in adapted else linear
            if name in adapted:
                layer.lora_index = index
            setattr(self, name, layer)
        join_siblings(self)
        self.cos, self.sin = random_rows(device, 2, len(SLOTS), DIM, dtype=torch.float32)
        self.places = torch.tensor([3, 7, 0, -1, 5, 2, 1, 9], device=device)
        self.cache = self.new_cache()

    def new_cache(self) -> KVCache:
        return KVCache(*torch.full((2, 3, 4, KV_HEADS, DIM), 7.0, device=self.places.device))

    def run(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor | None:
        layers = [getattr(self, name) for name in NAMES]
        with torch.inference_mode(), context:
            return run_rotary(layers, x[None], self.cos, self.sin, self.cache, self.places)

    def expected(self, x: torch.Tensor, context: ForwardContext) -> tuple[torch.Tensor, KVCache]:
        cache, outputs = self.new_cache(), []
        for name in NAMES:
            layer = getattr(self, name)
            base = layer.base_layer if isinstance(layer, SelectiveLinear) else layer
            y = nn.functional.linear(x, base.weight).detach()
            if isinstance(layer, SelectiveLinear):
                for plan in context.lora_plans(False):
                    reference.add_lora_(y, x, context.lora_weights[layer.lora_index], plan)
            outputs.append(y.view(len(x), -1, DIM))
        return reference_glue.rotary_and_write(*outputs, self.cos, self.sin, cache, self.places), cache


def static_plan(slots: np.ndarray, device: str, factor: float = 1.0) -> LoRAPlan:
    plan = plan_of_rows(slots, factor)
    plan.tiles = make_tiles(slots, torch.device(device), 16, has_base=True)._replace(with_adapter=None)
    return plan


@pytest.fixture
def context(device: str) -> ForwardContext:
    triton_interpreter.mend()
    outs = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
    weights = layers_of(device, [[3, 0, 9], [2, 4, 0], [17, 1, 8]], IN, outs, torch.float32, seed=1)
    return ForwardContext(lora=static_plan(SLOTS, device), lora_weights=weights)


@pytest.mark.parametrize("adapted", [NAMES, ("q_proj", "v_proj"), ("k_proj",)])
@pytest.mark.parametrize("corrected", [False, True])
def test_parts_of_all_plans_are_added_before_the_rotation(
    device: str, context: ForwardContext, adapted: tuple[str, ...], corrected: bool
) -> None:
    model, x = Projections(device, adapted), random_rows(device, len(SLOTS), IN, dtype=torch.float32, seed=1)
    if corrected:
        context.lora_correction = static_plan(np.where(SLOTS == 0, -1, 0).astype(np.int32), device, -1.0)
    query, cache = model.expected(x, context)
    torch.testing.assert_close(model.run(x, context), query, rtol=2e-5, atol=2e-5)
    for ours, theirs in zip(model.cache, cache, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: None)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, context: hook(model.k_proj),
        lambda model, context: hook(model.v_proj),
        lambda model, context: hook(model.q_proj.base_layer),
        lambda model, context: model.v_proj.__dict__.update(forward=model.v_proj.forward),
        lambda model, context: model.q_proj.__dict__.update(siblings=()),
        lambda model, context: setattr(context, "lora", None),
        lambda model, context: setattr(context.lora, "backend", "torch"),
        lambda model, context: setattr(context.lora, "tiles", context.lora.tiles._replace(with_adapter=2)),
        lambda model, context: setattr(model, "cache", KVCache(model.cache.key.half(), model.cache.value.half())),
        lambda model, context: [layer.__dict__.update(lora_index=-1) for layer in (model.q_proj, model.v_proj)],
    ],
)
def test_where_it_cannot_be_nothing_is_computed(
    device: str,
    context: ForwardContext,
    change: Callable[[Projections, ForwardContext], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """k_proj is no adapted layer."""
    model = Projections(device, ("q_proj", "v_proj"))
    x = random_rows(device, len(SLOTS), IN, dtype=torch.float32, seed=1)
    assert model.run(x, context) is not None
    change(model, context)
    monkeypatch.delattr(lora_fused, "call_together")
    assert model.run(x, context) is None


def test_a_launch_plan_turns_it_off(device: str, context: ForwardContext, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Projections(device), random_rows(device, len(SLOTS), IN, dtype=torch.float32, seed=1)
    assert model.run(x, context) is not None
    monkeypatch.setattr(lora_plans, "_find_plan", lambda shape, _: replace(default_plan(shape), joins_rotary=False))
    lora_plans.plan_for.cache_clear()
    try:
        assert model.run(x, context) is None
    finally:
        lora_plans.plan_for.cache_clear()
