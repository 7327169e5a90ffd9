"""Projections that Hugging Face's modules call one after another with one and the same tensor."""

from __future__ import annotations

from typing import Any

from torch import nn

FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def find_siblings(model: nn.Module, kind: type[nn.Module]) -> list[list[Any]]:
    """Groups of two or more such projections of one parent that are exactly of a kind.

    The names say what is usual; ``ForwardContext.shared_output`` compares the tensors of each call, so a model that
    uses the names otherwise gets the same answers.
    """
    groups = []
    for parent in model.modules():
        for family in FAMILIES:
            members = [parent._modules.get(name) for name in family]
            found = [member for member in members if type(member) is kind]
            if len(found) > 1:
                groups.append(found)
    return groups
