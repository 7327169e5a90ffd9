"""LoRA layers whose adapters' parts are left to what follows: a norm behind the sum, an activation, a rotation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from peft_dist.forward_context import current
from peft_dist.kernels import lora as kernels
from peft_dist.kernels.glue import Activation, Glue, implementation
from peft_dist.patches.lora_layers import (
    SelectiveLinear,
    add_parts,
    check_rows,
    is_seen,
    multiplied,
    weights_of,
)
from peft_dist.patches.lora_ways import beside, inside, planned, tries_inside
from peft_dist.patches.together import call_as_made, call_planned, call_together, multiply_few


def run_gated(
    gate: nn.Module, up: nn.Module, x: torch.Tensor, activation: Activation, glue: Glue | None = None
) -> torch.Tensor | None:
    """``activation(gate(x)) * up(x)`` with the adapters' parts added in the pass that the activation takes, or all of
    it in one launch.

    None, with nothing computed, where neither is to be had: without kernels of Triton, for many rows without adapters,
    and for modules that are no siblings, or whose outputs somebody else sees.

    Args:
        activation: "silu" or "gelu_tanh".
        glue: For an activation that is a pass of its own; None: Triton's.
    """
    context = current()
    if context is None:
        return None
    if type(gate) is not SelectiveLinear or type(up) is not SelectiveLinear:
        return multiply_few([gate, up], x, activation)
    layers = gate.siblings
    if len(layers) != 2 or layers[0] is not gate or layers[1] is not up or any(map(is_seen, layers)):
        return None
    plans = context.lora_plans(gate.is_output)
    weights = weights_of(layers, context) if plans else []
    if weights.count(None) == len(weights):
        return multiply_few(multiplied(layers, context), x, activation)
    for plan in plans:
        check_rows(gate, x.numel() // x.shape[-1], plan)
    best = planned(x, weights, plans, context, activation)
    compute = beside(x, weights, plans, context, best)
    if compute is None and not kernels.has_gate(x, weights, plans[-1]):
        return None
    below = multiplied(layers, context)
    fused = inside(below, x, weights, plans, context, activation) if tries_inside(best, compute) else None
    if fused is not None:
        return fused
    if compute is not None:
        wide, parts = compute(lambda: call_as_made(below, x))
        gate_rows, up_rows, *added = (t.reshape(-1, t.shape[-1]) for t in (*wide, *parts))
        glue = glue or implementation("triton")
        return glue.gated(gate_rows, up_rows, activation, added).view(wide[0].shape)
    begun = kernels.begin_lora(x, weights, plans[0])
    outputs = call_planned(below, x, with_adapters=True)
    if len(plans) > 1:
        add_parts(outputs, x, weights, plans[:-1], begun)
        begun = None
    return kernels.lora_gate(outputs[0], outputs[1], x, weights, plans[-1], activation, begun)


def run_apart(
    modules: Sequence[nn.Module], x: torch.Tensor
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor] | None] | None:
    """Outputs of modules that read x, and the adapters' parts for the caller to add: None where the outputs have them.

    None, with nothing computed, where the pass adds parts at once (``PartsBeside``), and for modules that are no
    siblings, or whose outputs somebody else sees.
    """
    context = current()
    if context is None or context.parts_beside is None:
        return None
    if any(type(module) is not SelectiveLinear for module in modules):
        return None
    layers = cast(Sequence[SelectiveLinear], modules)
    siblings = layers[0].siblings or tuple(layers)
    if len(siblings) != len(layers) or any(a is not b for a, b in zip(siblings, layers, strict=True)):
        return None
    plans = context.lora_plans(layers[0].is_output)
    if any(map(is_seen, layers)):
        return None
    weights = weights_of(layers, context) if plans else []
    if weights.count(None) == len(weights):
        return None
    check_rows(layers[0], x.numel() // x.shape[-1], plans[0])
    best = planned(x, weights, plans, context)
    compute = beside(x, weights, plans, context, best)
    if compute is None:
        return None
    below = multiplied(layers, context)
    fused = inside(below, x, weights, plans, context) if tries_inside(best, compute) else None
    if fused is not None:
        return fused.split([layer.out_features for layer in layers], dim=-1), None
    return compute(lambda: call_as_made(below, x))


def run_before_sum(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A module's output, of which the adapters' part is handed to a caller that takes it (``takes_part``)."""
    context = current()
    found = run_apart([module], x) if context is not None and context.takes_part else None
    if context is None or found is None:
        return call_together([module], x)[0]
    outputs, parts = found
    if parts is not None:
        context.hand_part(outputs[0], parts[0])
    return outputs[0]
