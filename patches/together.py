"""Layers that read one tensor, computed in one multiplication where their weights lie together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from peft_dist.patches.joined_linear import JoinedLinear, Joint
from peft_dist.patches.packed_linear import PackedLinear, Packing


def call_together(modules: Sequence[nn.Module], x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Outputs of modules that read x: in one multiplication where these very modules are packed or joined as one."""
    group = _group_of(modules[0])
    if group is not None and not torch.is_grad_enabled() and x.numel():
        layers = group.layers
        if len(layers) == len(modules) and all(a is b for a, b in zip(layers, modules, strict=True)):
            return group.outputs(x)
    return [module(x) for module in modules]


def plain_weight(modules: Sequence[nn.Module]) -> torch.Tensor | None:
    """``[sum of out_features, in_features]``, whose product with x is all that these modules compute; None where they
    compute more, or each by itself."""
    if torch.is_grad_enabled():
        return None
    first = modules[0]
    if len(modules) == 1 and type(first) is nn.Linear:
        is_plain = first.bias is None and "forward" not in first.__dict__ and type(first.weight) is nn.Parameter
        return first.weight.data if is_plain and not _has_hooks(first) else None
    joint = first._joint if type(first) is JoinedLinear else None
    if joint is None or len(joint.layers) != len(modules) or joint.bias is not None or not joint.is_intact:
        return None
    is_whole = all(a is b and not _has_hooks(a) for a, b in zip(joint.layers, modules, strict=True))
    return joint.weight if is_whole else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _group_of(module: nn.Module) -> Packing | Joint | None:
    if type(module) is PackedLinear:
        return module._packing
    return module._joint if type(module) is JoinedLinear else None
