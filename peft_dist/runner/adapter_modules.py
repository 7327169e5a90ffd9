"""The base model as adapters see it: which modules can be adapted, and their shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_dist.patches.sharding import ModulePart

ModuleKind = Literal["linear", "conv1d", "embedding"]


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """One module that can be adapted.

    Attributes:
        kind: "linear" (nn.Linear), "conv1d" (transformers' Conv1D, weight stored ``[in, out]``) or "embedding".
        in_features: Width of the input; the number of embeddings for an embedding.
        out_features: Width of the output.
        weight: Reads the base weight, in the layout the module stores it. Only adapters that bring a copy of it
            need it; None refuses nothing for its values, only for its shape.
        part: What of it this process has, where it is split over ranks; ``weight`` reads that part alone.
        row_rms: Root mean square norm of the weights of one output (an embedding: of one token), where adapters may be
            merged into it; else None.
    """

    kind: ModuleKind
    in_features: int
    out_features: int
    weight: Callable[[], torch.Tensor] | None = field(default=None, repr=False, compare=False)
    row_rms: float | None = field(default=None, repr=False, compare=False)
    part: ModulePart | None = None

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the stored base weight."""
        if self.kind == "linear":
            return (self.out_features, self.in_features)
        return (self.in_features, self.out_features)


def describe_modules(model: nn.Module) -> dict[str, ModuleShape]:
    """Every nn.Linear, Conv1D and nn.Embedding of ``model`` by its path in the base model.

    A layer that wraps another one as ``base_layer`` (PEFT's or ours) counts as the wrapped one under the same path,
    and a whole PeftModel as its base. The result refers to the modules and so keeps them alive.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    shapes: dict[str, ModuleShape] = {}
    wrappers: list[str] = []
    for path, module in model.named_modules():
        if path.startswith(tuple(wrappers)):
            continue
        if hasattr(module, "base_layer"):
            wrappers.append(f"{path}.")
        if shape := _shape(_innermost(module)):
            shapes[path] = shape
    return shapes


def _innermost(module: nn.Module) -> nn.Module:
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def _shape(module: nn.Module) -> ModuleShape | None:
    def weight() -> torch.Tensor:
        return module.weight

    if isinstance(module, nn.Linear):
        return ModuleShape("linear", module.in_features, module.out_features, weight)
    if isinstance(module, Conv1D):
        return ModuleShape("conv1d", module.weight.shape[0], module.weight.shape[1], weight)
    if isinstance(module, nn.Embedding):
        return ModuleShape("embedding", module.num_embeddings, module.embedding_dim, weight)
    return None
