"""Adapted layers whose outputs are used only by a kernel that can add the adapters' parts itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from peft_dist.forward_context import ForwardContext, current
from peft_dist.kernels import lora as kernels
from peft_dist.kernels.lora_down import ShrinkInGate
from peft_dist.kernels.types import KVCache, LoRALayerWeights, LoRAPlan
from peft_dist.patches.joined_linear import JoinedLinear
from peft_dist.patches.lora_layers import SelectiveLinear, add_parts, check_rows, is_hooked, multiplied, weights_of
from peft_dist.patches.together import call_together


def run_mlp(gate: nn.Module, up: nn.Module, down: nn.Module, x: torch.Tensor, activation: str) -> torch.Tensor | None:
    """``down(activation(gate(x)) * up(x))`` with the adapters' parts of gate and up added in the activation's pass.

    In a captured step that pass does the first half of down's part too.

    None, with nothing computed, where that is not to be had: without adapters or kernels of Triton, and for modules
    that are no siblings, or whose outputs somebody else sees.

    Args:
        activation: "silu" or "gelu_tanh".
    """
    context = current()
    if context is None or type(gate) is not SelectiveLinear or type(up) is not SelectiveLinear:
        return None
    layers = gate.siblings
    if len(layers) != 2 or layers[0] is not gate or layers[1] is not up or any(map(_is_seen, layers)):
        return None
    plans = context.lora_plans(gate.is_output)
    if not plans:
        return None
    weights = weights_of(layers, context)
    if not kernels.has_gate(x, weights, plans[-1]):
        return None
    for plan in plans:
        check_rows(gate, x.numel() // x.shape[-1], plan)
    begun = kernels.begin_lora(x, weights, plans[0])
    outputs = call_together(multiplied(layers, context), x)
    if len(plans) > 1:
        add_parts(outputs, x, weights, plans[:-1], begun)
        begun = None
    shrink = _shrink_of(down, x, weights, plans[-1], context)
    gated = kernels.lora_gate(outputs[0], outputs[1], x, weights, plans[-1], activation, begun, shrink)
    if shrink is None:
        hidden: torch.Tensor = down(gated)
        return hidden
    ys = call_together(multiplied([cast(SelectiveLinear, down)], context), gated)
    add_parts(ys, gated, [shrink.weights], plans[:-1], None)
    shrink.finish_(ys)
    return ys[0]


def _shrink_of(
    down: nn.Module,
    x: torch.Tensor,
    weights: Sequence[LoRALayerWeights | None],
    plan: LoRAPlan,
    context: ForwardContext,
) -> ShrinkInGate | None:
    """The first half of down's part in its gate's kernel; None where down is called as any module."""
    if type(down) is not SelectiveLinear or not _are_alone([down]):
        return None
    return ShrinkInGate.find(x, weights, weights_of([down], context)[0], plan)


def run_rotary(
    projections: Sequence[nn.Module],
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: KVCache,
    slot_mapping: torch.Tensor,
) -> torch.Tensor | None:
    """Queries, keys and values of x with the adapters' parts added in the pass that rotates them.

    None, with nothing computed, where that is not to be had, as for ``run_mlp``, or not the best way.

    Args:
        projections: Of queries, keys and values; some of them adapted.
        cos, sin, cache, slot_mapping: As ``glue.Glue.rotary_and_write`` takes them; the whole head turns.

    Returns:
        The queries as that function gives them.
    """
    context = current()
    if context is None:
        return None
    layers = [layer for layer in projections if type(layer) is SelectiveLinear]
    plans = context.lora_plans(False)
    if not layers or not plans or not _are_alone(layers) or not all(map(_is_plain, projections)):
        return None
    found = dict(zip(layers, weights_of(layers, context), strict=True))
    weights = [found.get(layer) for layer in projections]  # type: ignore[call-overload]
    if not kernels.has_rotary(x, weights, plans[-1], cache, cos.shape[1]):
        return None
    rows = x.numel() // x.shape[-1]
    for plan in plans:
        check_rows(layers[0], rows, plan)
    begun = kernels.begin_lora(x, weights, plans[0])
    outputs = call_together(_called(projections, context), x)
    if len(plans) > 1:
        add_parts(outputs, x, weights, plans[:-1], begun)
        begun = None
    query, key, value = (y.view(rows, -1, cos.shape[1]) for y in outputs)
    return kernels.lora_rotary(query, key, value, cos, sin, cache, slot_mapping, x, weights, plans[-1], begun)


def _are_alone(layers: Sequence[SelectiveLinear]) -> bool:
    """Whether no others are computed with these, and nobody sees their outputs or those of other rows."""
    siblings = layers[0].siblings or layers[:1]
    same = len(siblings) == len(layers) and all(a is b for a, b in zip(siblings, layers, strict=True))
    return same and not layers[0].is_output and not any(map(_is_seen, layers))


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) is SelectiveLinear:
        return True
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__
    return type(layer) in (nn.Linear, JoinedLinear) and not hooked


def _called(projections: Sequence[nn.Module], context: ForwardContext) -> list[nn.Module]:
    """What a pass multiplies with for these."""
    return [multiplied([layer], context)[0] if type(layer) is SelectiveLinear else layer for layer in projections]


def _is_seen(layer: SelectiveLinear) -> bool:
    """Whether the layer's own output has to be there, not only what becomes of it."""
    return (
        layer.combination is not None or bool(layer._forward_hooks) or "forward" in layer.__dict__ or is_hooked(layer)
    )
