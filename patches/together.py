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


def _group_of(module: nn.Module) -> Packing | Joint | None:
    if type(module) is PackedLinear:
        return module._packing
    return module._joint if type(module) is JoinedLinear else None
