"""Which layers of a model an adapter can be merged into, and why not into the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_dist.kernels.lora_pool import LayerTensors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class MergeSites:
    """The layers that LoRA adapts, by their path in the model (that of a LoRA layer around them, where there is one).

    Attributes:
        modules: Base layers that can be merged into.
        cannot: Why not, of the other layers.
    """

    modules: Mapping[str, nn.Module]
    cannot: Mapping[str, str]

    def reason_against(self, path: str) -> str | None:
        """Why an adapter of this layer cannot be merged; None when it can."""
        if path in self.modules:
            return None
        return self.cannot.get(path, "it is no layer of the model that LoRA adapts")


def find_sites(model: nn.Module, exclusive: bool) -> MergeSites:
    """Look at every linear layer, Conv1D and embedding of a model.

    Args:
        exclusive: The weights themselves are written, so one that a second module reads cannot be merged into.
    """
    shared = shared_weights(model) if exclusive else {}
    modules: dict[str, nn.Module] = {}
    cannot: dict[str, str] = {}
    for path, module in _base_layers(model):
        reason = _reason_against(module) or shared.get(id(module))
        if reason:
            cannot[path] = reason
        else:
            modules[path] = module
    return MergeSites(modules, cannot)


def oriented(module: nn.Module, tensors: LayerTensors) -> LayerTensors:
    """A ``[r, columns]`` and B ``[rows, r]`` for the weight as the module stores it, of PEFT's A and B.

    Conv1D stores ``[in, out]`` and an embedding ``[num_embeddings, dim]``: there the transposed product is added.
    (Gemma's factor is no part of the weight: the module applies it to whatever it has looked up.)
    """
    A, B, scaling = tensors
    return (B.T, A.T, scaling) if is_turned(module) else tensors


def is_turned(module: nn.Module) -> bool:
    """Whether the module stores its weight ``[in, out]``."""
    return isinstance(module, (Conv1D, nn.Embedding))


def _base_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    wrappers: list[str] = []
    for path, module in model.named_modules():
        if path.startswith(tuple(wrappers)):
            continue
        if isinstance(base := getattr(module, "base_layer", None), nn.Module):
            wrappers.append(f"{path}.")
            module = base
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
            yield path, module


def _reason_against(module: nn.Module) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return f"its {type(module).__name__} has no weight of its own"
    if type(weight) not in (torch.Tensor, nn.Parameter) or weight.dtype not in _DTYPES:
        return f"its weight is {type(weight).__name__} of {weight.dtype} (quantised?), not a dense float tensor"
    if weight.dim() != 2 or weight.is_meta:
        return "its weight is not in memory as one matrix"
    if "forward" in module.__dict__ or module._forward_pre_hooks or module._forward_hooks:
        return "something else has replaced or hooked its forward"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "its embedding changes its own weight (max_norm)"
    return None


def shared_weights(model: nn.Module) -> dict[int, str]:
    """Why not, by the id of a module whose weight overlaps in memory with a parameter of another module."""
    spans = []
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta and parameter.numel():
                spans.append((*_span(parameter), path, name, id(module)))
    spans.sort(key=lambda span: span[:2])
    reasons: dict[int, str] = {}
    widest = None
    for span in spans:
        if widest is not None and span[0] < widest[1]:
            for one, other in ((span, widest), (widest, span)):
                if one[3] == "weight" and one[4] != other[4]:
                    reasons[one[4]] = f"its weight is shared with {other[2] or 'the model'}: both would change"
        if widest is None or span[1] > widest[1]:
            widest = span
    return reasons


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First address, and the address behind the last element. Devices have addresses of their own."""
    elements = 1 + sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()
