"""Layers are computed the way that was measured for them, and the answer is the same in all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peft_dist.kernels.lora_parts_beside import PartsBeside
from peft_dist.kernels.product_plans import ProductPlan, Way
from peft_dist.kernels.products import Products
from peft_dist.patches import lora_ways, together
from peft_dist.patches.lora_apart import run_apart
from tests.kernels.lora_cases import DEVICES, random_rows
from tests.patches.test_few_rows import HALF, IN, SLOTS, Counted, Layers, context_of

pytest.importorskip("triton")
pytestmark = pytest.mark.parametrize("device", DEVICES)


class Told(Products):
    """Knows the best way without measuring, and what was asked for."""

    def __init__(self, alone: ProductPlan | None, adapted: ProductPlan | None) -> None:
        self.plans, self.asked = (alone, adapted), []

    def alone(self, x: torch.Tensor, out_features: Any, **options: Any) -> ProductPlan | None:
        self.asked.append(("alone", options))
        return self.plans[0]

    def adapted(self, x: torch.Tensor, weights: Any, plan: Any, **options: Any) -> ProductPlan | None:
        self.asked.append(("adapted", options))
        return self.plans[1]


class Beside(PartsBeside):
    """Knows the multiprocessors that it was told to spare."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.spared: list[int | None] = []

    def compute(self, x, weights, plan, multiply, spared=None):  # type: ignore[no-untyped-def]
        self.spared.append(spared)
        return super().compute(x, weights, plan, multiply, spared)


class Leaving:
    """A combination of one rank, which notes what it was given."""

    def __init__(self) -> None:
        self.outputs: list[int] = []

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def leave(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        self.outputs.append(y.data_ptr())
        return y


@pytest.fixture
def spared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What products without parts beside them were told to spare."""
    counts: list[int] = []
    spare = together.spare_multiprocessors

    def noted(count: int) -> Any:
        counts.append(count)
        return spare(count)

    monkeypatch.setattr(together, "spare_multiprocessors", noted)
    return counts


@pytest.mark.parametrize(("way", "few_count"), [("library", 0), ("kernel", 1), (None, 1)])
def test_products_alone(device: str, way: Way | None, few_count: int, spared: list[int]) -> None:
    layers, x = Layers(device), random_rows(device, 1, len(SLOTS), IN, dtype=torch.float16)
    usual = layers.outputs(x, context_of(device, None, adapted=False))
    few, context = Counted(device), None
    context = context_of(device, few, adapted=False)
    context.products = told = Told(None if way is None else ProductPlan(way, 24 if way == "library" else 0), None)
    for found, wanted in zip(layers.outputs(x, context), usual, strict=True):
        torch.testing.assert_close(found, wanted, **HALF)
    assert few.count == few_count and spared == ([24] if way == "library" else [])
    context = context_of(device, few, adapted=False)
    context.products = told
    gated = layers.gated(x, context)
    assert (gated is None) == (way == "library") and told.asked[-1] == ("alone", {"few": True, "activation": "silu"})


@pytest.mark.parametrize(
    ("way", "inside", "beside"),
    [("inside", 1, []), ("beside", 0, [16]), ("behind", 0, []), (None, 1, [])],
)
def test_a_gated_mlp_with_adapters(
    device: str, way: Way | None, inside: int, beside: list[int], spared: list[int]
) -> None:
    layers, x = Layers(device), random_rows(device, 1, len(SLOTS), IN, dtype=torch.float16)
    first, second = layers.outputs(x, context_of(device, None))
    few, parts = Counted(device), Beside(device)
    context = context_of(device, few)
    context.parts_beside = parts
    context.products = told = Told(ProductPlan("library", 8), None if way is None else ProductPlan(way, 16))
    found = layers.gated(x, context)
    assert found is not None
    torch.testing.assert_close(found, nn.functional.silu(first) * second, **HALF)
    assert (few.count, parts.spared) == (inside, beside)
    assert spared == ([8] if way == "behind" else [])
    assert told.asked[0] == ("adapted", {"few": True, "activation": "silu"})


@pytest.mark.parametrize(
    ("way", "apart", "inside"), [("inside", False, 1), ("beside", True, 1), ("behind", False, 0), (None, False, 1)]
)
def test_outputs_whose_parts_somebody_may_add(device: str, way: Way | None, apart: bool, inside: int) -> None:
    """Where nobody adds them, what is best beside is computed inside."""
    layers, x = Layers(device), random_rows(device, 1, len(SLOTS), IN, dtype=torch.float16)
    usual = layers.outputs(x, context_of(device, None))
    modules, few = [layers.gate_proj, layers.up_proj], Counted(device)

    def context() -> Any:
        made = context_of(device, few)
        made.parts_beside, made.products = Beside(device), Told(None, None if way is None else ProductPlan(way, 16))
        return made

    with torch.inference_mode(), context():
        found = run_apart(modules, x)
    if way is None:
        # Unmeasured, it is inside where that is known.
        assert found is not None and found[1] is None and few.count == 1
        few.count = 0
    else:
        assert (found is not None) == apart and few.count == 0
    if found is not None:
        for i, wanted in enumerate(usual):
            whole = found[0][i] if found[1] is None else found[0][i] + found[1][i]
            torch.testing.assert_close(whole, wanted, **HALF)
    for output, wanted in zip(layers.outputs(x, context()), usual, strict=True):
        torch.testing.assert_close(output, wanted, **HALF)
    assert few.count == inside


@pytest.mark.parametrize("way", ["beside", "behind"])
def test_a_layer_whose_output_ranks_add_up(device: str, way: Way) -> None:
    """Its part is in the output that it leaves, whichever way that was computed."""
    layers, x = Layers(device), random_rows(device, 1, len(SLOTS), IN, dtype=torch.float16)
    usual = layers.outputs(x, context_of(device, None))[0]
    lone, left = layers.gate_proj, Leaving()
    lone.__dict__.update(siblings=(), combination=left)
    context, parts = context_of(device, None), Beside(device)
    context.parts_beside, context.products = parts, Told(ProductPlan("library", 8), ProductPlan(way, 16))
    with torch.inference_mode(), context:
        assert run_apart([lone], x) is None
        found = lone(x)
    assert left.outputs == [found.data_ptr()]
    torch.testing.assert_close(found, usual, **HALF)
    assert parts.spared == ([16] if way == "beside" else [])


def test_layers_without_anything_around_them_are_planned_together(device: str, spared: list[int]) -> None:
    """As all of a model's before its first adapter; a hooked one is called."""
    layers, x = Layers(device, wrapped=False), random_rows(device, 1, len(SLOTS), IN, dtype=torch.float16)
    modules = [layers.gate_proj, layers.up_proj]
    usual = layers.outputs(x, context_of(device, None, adapted=False))
    hooked: list[nn.Module] = []

    def outputs() -> Any:
        context = context_of(device, None, adapted=False)
        context.products = Told(ProductPlan("library", 24), None)
        with torch.inference_mode(), context:
            return together.call_each(modules, x)

    for found, wanted in zip(outputs(), usual, strict=True):
        torch.testing.assert_close(found, wanted, **HALF)
    assert spared == [24]
    layers.up_proj.register_forward_hook(lambda module, args, output: hooked.append(module))
    outputs()
    assert spared == [24] and hooked == [layers.up_proj]


def test_two_plans_are_never_measured(device: str) -> None:
    context = context_of(device, Counted(device))
    context.products = told = Told(None, ProductPlan("inside"))
    assert context.lora is not None
    x = random_rows(device, 1, len(SLOTS), IN, dtype=torch.float16)
    assert lora_ways.planned(x, list(context.lora_weights), [context.lora] * 2, context) is None and not told.asked
