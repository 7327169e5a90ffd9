"""What a forward pass multiplies with instead of base weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

from peft_dist.patches.joined_linear import Joint
from peft_dist.patches.packed_linear import Packing, unpack_linear


@dataclass(slots=True)
class MergedLayers:
    """Merged weights by what they stand in for; layers that are not in here run on the base's.

    Attributes:
        twins: By base layer, a module that shares everything with it but the weight.
        packed: By packing, the weights of its layers below one another in oneDNN's layout.
        joined: By joint, the weights of its layers below one another.
    """

    twins: dict[nn.Module, nn.Module] = field(default_factory=dict)
    packed: dict[Packing, torch.Tensor] = field(default_factory=dict)
    joined: dict[Joint, torch.Tensor] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, ...]:
        """Changes when a captured CUDA graph that read these weights must not be replayed for them."""
        return id(self), len(self.twins), len(self.joined)


def twin_of(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    """A module of the same class that shares everything with ``module`` but its weight, so that whatever the class
    does beside multiplying (a bias, Gemma's factor) is done to the merged weight as well."""
    twin = copy.copy(module)
    # A packing knows the original's weight alone. (The copy of a joined layer is plain already.)
    unpack_linear(twin)
    # The copy shares these dictionaries with the original.
    twin.__dict__["_parameters"] = {**module._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    return twin
