"""Where selective layers come from: PEFT's layers that are given another class, and base layers that are wrapped."""

from __future__ import annotations

import inspect

from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_dist.patches.lora_layers import SelectiveEmbedding, SelectiveLayer, SelectiveLinear

SWAPS: dict[type[nn.Module], type[SelectiveLinear] | type[SelectiveEmbedding]] = {
    LoraLinear: SelectiveLinear,
    LoraEmbedding: SelectiveEmbedding,
}
_OWN_ATTRIBUTES = ("lora_index", "is_output", "embed_factor", "siblings", "sibling_index")


def swap_class(layer: nn.Module) -> bool:
    """Give an existing PEFT layer of exactly a known class its selective subclass; False for any other module."""
    selective = SWAPS.get(type(layer))
    if selective is None:
        return False
    layer.__class__ = selective
    return True


def restore_class(layer: nn.Module) -> bool:
    """Undo ``swap_class``; False for a module that is not selective."""
    for original, selective in SWAPS.items():
        if type(layer) is selective:
            for name in _OWN_ATTRIBUTES:
                layer.__dict__.pop(name, None)
            layer.__class__ = original
            return True
    return False


def can_wrap(module: nn.Module) -> bool:
    """Whether ``wrap_module`` knows this kind of base layer.

    An embedding that takes more than ids (OPT's positions take a mask) looks up other rows than it is given.
    """
    if isinstance(module, nn.Embedding):
        return len(inspect.signature(type(module).forward).parameters) == 2
    return isinstance(module, (nn.Linear, Conv1D))


def make_layer(model: nn.Module, path: str) -> SelectiveLayer:
    """A selective layer without adapters for the module at ``path`` of a stock model, which stays as it is.

    Takes most of the time of ``wrap_module``, and may run on any thread.

    Raises:
        TypeError: the module is of a kind that LoRA does not adapt here.
    """
    module = model.get_submodule(path)
    if isinstance(module, (SelectiveLinear, SelectiveEmbedding)):
        return module
    if not can_wrap(module):
        raise TypeError(
            f"{path} is a {type(module).__name__}; LoRA needs nn.Linear, transformers' Conv1D or nn.Embedding"
        )
    layer = SelectiveEmbedding.wrap(module) if isinstance(module, nn.Embedding) else SelectiveLinear.wrap(module)
    layer.is_output = sees_kept_rows(model, path, module)
    return layer


def wrap_module(model: nn.Module, path: str, made: SelectiveLayer | None = None) -> SelectiveLayer:
    """Put a selective layer without adapters around the module at ``path`` of a stock model, and return it.

    Args:
        made: What ``make_layer`` made for this module.

    Raises:
        TypeError: the module is of a kind that LoRA does not adapt here.
    """
    module = model.get_submodule(path)
    if made is None or made.base_layer is not module:
        made = make_layer(model, path)
    if made is not module:
        model.set_submodule(path, made)
    return made


def unwrap_module(model: nn.Module, path: str) -> nn.Module:
    """Put the base layer back where ``wrap_module`` put a selective layer, and return it."""
    layer = model.get_submodule(path)
    if not isinstance(layer, (SelectiveLinear, SelectiveEmbedding)):
        return layer
    base: nn.Module = layer.base_layer
    model.set_submodule(path, base)
    return base


def sees_kept_rows(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether a linear layer of a causal language model gets only the rows whose logits are wanted.

    Transformers' models drop the other rows between the decoder (``base_model_prefix``) and what follows it: the
    output layer, and in some families (BERT) layers before that.
    """
    getter = getattr(model, "get_output_embeddings", None)
    if getter is not None and module is getter():
        return True
    prefix = getattr(model, "base_model_prefix", "")
    return bool(prefix) and hasattr(model, prefix) and not path.startswith(f"{prefix}.")
