"""All weights of a model that can be multiplied together, joined and parted again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import nn

from peft_dist.patches.joined_linear import JoinedLinear, join_linears, joint_of, part_linear
from peft_dist.patches.merge_sites import shared_weights
from peft_dist.patches.siblings import FAMILIES


def join_weights(model: nn.Module) -> int:
    """Join the weights of q/k/v and of gate/up projections, below LoRA layers too; the number of groups.

    On a GPU the memory that weights had goes back to the driver after each group, so that the peak is one group above
    the model. Idempotent; on an error nothing has changed.
    """
    shared = shared_weights(model)
    count = 0
    with ExitStack() as undo:
        for group in _groups(model):
            if joint_of(group[0]) is None and not any(id(layer) in shared for layer in group) and join_linears(group):
                undo.callback(part_linear, group[0])
                count += 1
                if group[0].weight.is_cuda:  # type: ignore[union-attr]
                    torch.cuda.empty_cache()
        undo.pop_all()
    return count


def part_weights(model: nn.Module) -> None:
    """Undo ``join_weights``."""
    for module in list(model.modules()):
        if type(module) is JoinedLinear:
            part_linear(module)


def _groups(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Families of which a parent has every member."""
    for parent in model.modules():
        for family in FAMILIES:
            members = [getattr(parent, name, None) for name in family]
            found = [getattr(member, "base_layer", member) for member in members]
            if all(isinstance(member, nn.Linear) for member in found):
                yield found
