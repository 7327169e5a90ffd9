"""What a selective batch covers. Everything else runs PEFT's own path, with the reason logged once per model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft import PeftModel, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from peft_dist.kernels.lora_pool import LayerTensors
from peft_dist.patches.lora_layers import SelectiveEmbedding, SelectiveLayer, SelectiveLinear

BASE_NAME = "__base__"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tuner_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every adapter layer and every wrapper of a fully trained module below ``module``, with its path."""
    for name, child in module.named_children():
        if isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield name, child
        else:
            yield from ((f"{name}.{path}", layer) for path, layer in tuner_layers(child))


def adapter_weights(layer: SelectiveLayer, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The live A ``[r, in]`` and B ``[out, r]`` of an adapter in a layer; None where it has none."""
    if isinstance(layer, SelectiveEmbedding):
        if name not in layer.lora_embedding_A:
            return None
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    if name not in layer.lora_A:
        return None
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def known_adapters(layers: list[tuple[str, nn.Module]]) -> set[str]:
    """Names that at least one layer has weights for."""
    names: set[str] = set()
    for _, layer in layers:
        if isinstance(layer, LoraLayer):
            names.update(layer.lora_A, layer.lora_embedding_A)
    return names


def model_reason(model: PeftModel, generates: bool) -> str | None:
    """Why no selective batch can run on this model now, whatever the adapters; None when one can."""
    if not (isinstance(model, PeftModelForCausalLM) or _original_class(model) is PeftModel):
        return f"{_original_class(model).__name__} is not a causal language model"
    if not isinstance(model.base_model, LoraModel):
        return f"the tuner is {type(model.base_model).__name__}, not LoraModel"
    config = getattr(model.get_base_model(), "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return "the base model is an encoder-decoder or no transformers model"
    if model.training:
        return "the model is in training mode"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is enabled"
    if not generates and torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        return "gradients are enabled and some parameter requires them (use torch.no_grad())"
    return None


def layers_reason(layers: list[tuple[str, nn.Module]]) -> str | None:
    """Why the model's present layers rule a selective batch out, or None."""
    for path, layer in layers:
        if not isinstance(layer, (SelectiveLinear, SelectiveEmbedding)):
            return f"{path} is a {type(layer).__name__}, which only PEFT can mix"
        if layer.disable_adapters:
            return "adapters are disabled"
        if layer.merged:
            return f"adapter {layer.merged_adapters[0]!r} is merged"
        if ".experts." in path:
            return f"{path} sees its rows in another order than the batch"
        if _hooked(layer):
            return f"{path} has forward hooks on its adapters"
    return None


def collect_weights(
    layers: list[tuple[str, nn.Module]], names: Collection[str], active: Collection[str]
) -> tuple[dict[str, dict[int, LayerTensors]], str | None]:
    """The live weights of the adapters to use, by name and number of the layer; or why PEFT has to run instead.

    ``active`` adapters are looked at as well: PEFT passes extra arguments to all layers for some kinds of them.
    """
    found: dict[str, dict[int, LayerTensors]] = {name: {} for name in names}
    for index, (path, layer) in enumerate(layers):
        assert isinstance(layer, (SelectiveLinear, SelectiveEmbedding))
        if variant := next((name for name in active if name in layer.lora_variant), None):
            return {}, f"active adapter {variant!r} at {path}: variant {type(layer.lora_variant[variant]).__name__}"
        for name in names:
            if (weights := adapter_weights(layer, name)) is None:
                continue
            if reason := _weights_reason(layer, name, weights):
                return {}, f"adapter {name!r} at {path}: {reason}"
            found[name][index] = (weights[0].detach(), weights[1].detach(), float(layer.scaling[name]))
    return found, None


def _weights_reason(layer: SelectiveLayer, name: str, weights: tuple[torch.Tensor, torch.Tensor]) -> str | None:
    if name in layer.lora_variant:
        return f"variant {type(layer.lora_variant[name]).__name__}"
    if layer.lora_bias.get(name):
        return "lora_bias"
    dropout = layer.lora_dropout[name]
    if dropout.training and getattr(dropout, "p", 0.0):
        return "dropout is active"
    if isinstance(layer, SelectiveEmbedding) and layer.get_base_layer().max_norm is not None:
        return "the embedding has a max_norm"
    home = layer.get_base_layer().weight
    for tensor in (*weights, home):
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.dtype not in _DTYPES:
            return f"weights are {type(tensor).__name__} of {tensor.dtype}"
        if tensor.device != home.device:
            return f"weights lie on {tensor.device}, the base layer on {home.device}"
    return None


def _hooked(layer: Any) -> bool:
    parts = [*layer.lora_A.values(), *layer.lora_B.values()]
    return any(part._forward_hooks or part._forward_pre_hooks for part in parts)


def _original_class(model: PeftModel) -> type:
    return getattr(type(model), "peft_dist_original", type(model))


def check_names(names: Any, known: Collection[str], batch: int) -> list[str]:
    """The names of a call, one per row of its batch.

    Raises:
        TypeError: ``names`` is not a list or tuple of strings.
        ValueError: their number is not the batch size, or a name is unknown (the known ones are listed).
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names must be a list of str ({BASE_NAME!r} for the base model), not {names!r}")
    unknown = sorted(set(names) - set(known) - {BASE_NAME})
    if unknown:
        raise ValueError(
            f"adapter_names holds non-existing adapter(s): {', '.join(unknown)}; "
            f"known are {', '.join([BASE_NAME, *sorted(known)])}"
        )
    if len(names) != batch:
        raise ValueError(
            f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {batch} "
            "respectively: give one name per row of the batch"
        )
    return list(names)
