"""Layers that read one tensor, computed in one multiplication where their weights lie together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from peft_dist.forward_context import ForwardContext, current
from peft_dist.kernels.glue import Activation
from peft_dist.kernels.spared import spare_multiprocessors
from peft_dist.patches.joined_linear import JoinedLinear, Joint
from peft_dist.patches.packed_linear import PackedLinear, Packing


def call_together(modules: Sequence[nn.Module], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Outputs of modules that read x: in one multiplication where these very modules are packed or joined as one."""
    few = multiply_few(modules, x)
    if few is not None:
        return few.split(_sizes(modules), dim=-1)
    return call_planned(modules, x)


def call_planned(
    modules: Sequence[nn.Module], x: torch.Tensor, *, with_adapters: bool = False
) -> Sequence[torch.Tensor]:
    """The same by torch's libraries, planned as was measured to be the fastest (``Products.alone``).

    Args:
        with_adapters: Of layers that have some: our kernel for few rows is no way to compute these.
    """
    context = current()
    products = None if context is None else context.products
    weight = None if context is None or products is None else plain_weight(modules, context)
    if context is None or products is None or weight is None:
        return call_as_made(modules, x)
    few = context.few_rows is not None and not with_adapters and context.few_rows.takes(x, weight)
    plan = products.alone(x, _sizes(modules), few=few)
    with spare_multiprocessors(0 if plan is None else plan.spared):
        return call_as_made(modules, x)


def call_each(modules: Sequence[nn.Module], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Outputs of modules that a model calls with x one after another: by ``call_together`` where that is all they do,
    and products are planned."""
    context = current()
    if context is not None and context.products is not None and plain_weight(modules, context) is not None:
        return call_together(modules, x)
    return [module(x) for module in modules]


def call_as_made(modules: Sequence[nn.Module], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """The same by torch's libraries in any case, as beside adapters' kernels."""
    group = _group_of(modules[0])
    if group is not None and not torch.is_grad_enabled() and x.numel():
        layers = group.layers
        if len(layers) == len(modules) and all(a is b for a, b in zip(layers, modules, strict=True)):
            return group.outputs(x)
    return [module(x) for module in modules]


def multiply_few(
    modules: Sequence[nn.Module], x: torch.Tensor, activation: Activation | None = None
) -> torch.Tensor | None:
    """Outputs of modules that read x beside one another, or two modules' ``activation(first) * second``, where the pass
    has a faster way for its few rows (``FewRows.multiply``)."""
    context = current()
    if context is None or context.few_rows is None:
        return None
    weight = plain_weight(modules, context)
    if weight is None:
        return None
    if context.products is not None:
        if not context.few_rows.takes(x, weight, activation):
            return None
        plan = context.products.alone(x, _sizes(modules), few=True, activation=activation)
        if plan is not None and plan.way != "kernel":
            return None
    return context.few_rows.multiply(x, weight, activation)


def plain_weight(modules: Sequence[nn.Module], context: ForwardContext) -> torch.Tensor | None:
    """``[sum of out_features, in_features]``, whose product with x is all that these modules compute in this pass; None
    where they compute more, or each by itself."""
    first = modules[0]
    if torch.is_grad_enabled() or any(map(_is_changed, modules)):
        return None
    if len(modules) == 1 and type(first) is nn.Linear:
        return first.weight.data if first.bias is None and type(first.weight) is nn.Parameter else None
    joint = first._joint if type(first) is JoinedLinear else None
    if joint is None or len(joint.layers) != len(modules) or joint.bias is not None:
        return None
    if any(a is not b for a, b in zip(joint.layers, modules, strict=True)):
        return None
    merged = None if context.merged is None else context.merged.joined.get(joint)
    return merged if merged is not None or not joint.is_intact else joint.weight


def _sizes(modules: Sequence[nn.Module]) -> list[int]:
    return [cast(int, module.out_features) for module in modules]


def _is_changed(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks) or "forward" in module.__dict__


def _group_of(module: nn.Module) -> Packing | Joint | None:
    if type(module) is PackedLinear:
        return module._packing
    return module._joint if type(module) is JoinedLinear else None
