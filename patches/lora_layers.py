"""PEFT's LoRA layers with a forward pass that serves rows of many adapters at once.

Outside of a ForwardContext each runs PEFT's own code, so training, merging and saving are untouched.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_dist.forward_context import ForwardContext, current
from peft_dist.kernels import lora as kernels
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan
from peft_dist.patches.packed_linear import call_together
from peft_dist.patches.siblings import find_siblings


class SelectiveLinear(LoraLinear):
    """``peft.tuners.lora.Linear`` whose rows may each belong to another adapter slot.

    Attributes:
        lora_index: Where the layer's weights stand in ``ForwardContext.lora_weights``.
        is_output: The layer sees only the rows whose logits are wanted (``lm_head``).
        siblings: The layers that are called with the same input, this one among them (``join_siblings``).
    """

    lora_index: int = -1
    is_output: bool = False
    siblings: tuple[SelectiveLinear, ...] = ()
    sibling_index: int = 0

    @classmethod
    def wrap(cls, base_layer: nn.Module) -> SelectiveLinear:
        """A PEFT layer with no adapters around ``nn.Linear`` or ``Conv1D``."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        LoraLayer.__init__(layer, base_layer)
        layer.fan_in_fan_out = layer.is_target_conv_1d_layer = isinstance(base_layer, Conv1D)
        layer.train(base_layer.training)
        return layer

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        context = current()
        if context is None:
            return super().forward(x, *args, **kwargs)
        # PEFT's hooks pass names; they outlive a call that failed, and the context knows better.
        kwargs.pop("adapter_names", None)
        if args or kwargs:
            raise TypeError(f"a linear layer takes one tensor, not also {[*args, *kwargs]}")
        if len(self.siblings) < 2:
            return _run([self], x, context)[0]
        siblings = self.siblings
        return context.shared_output(siblings, self.sibling_index, x, lambda x: _run(siblings, x, context))


class SelectiveEmbedding(LoraEmbedding):
    """``peft.tuners.lora.Embedding`` whose rows may each belong to another adapter slot."""

    lora_index: int = -1
    is_output: bool = False

    @classmethod
    def wrap(cls, base_layer: nn.Module) -> SelectiveEmbedding:
        """A PEFT layer with no adapters around ``nn.Embedding``."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        LoraLayer.__init__(layer, base_layer)
        layer.fan_in_fan_out = False
        layer.device_mesh = layer.tp_layer = None
        layer.input_fns, layer.output_fns = {}, {}
        layer.train(base_layer.training)
        return layer

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Token ids ``[...]`` to ``[..., embedding_dim]``."""
        context = current()
        if context is None:
            return super().forward(x, *args, **kwargs)
        # PEFT's hooks pass names; they outlive a call that failed, and the context knows better.
        kwargs.pop("adapter_names", None)
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        plan, weights = _adapters_of(self, context)
        if plan is None or weights is None:
            return y
        ids = x.reshape(-1)
        _check_rows(self, len(ids), plan)
        out = y.reshape(-1, y.shape[-1])
        return kernels.add_embedding_lora_(out, ids, weights, plan, self._embed_factor()).view(y.shape)

    def _embed_factor(self) -> float | None:
        """Gemma multiplies its embeddings; read once, because reading a device tensor waits for the device."""
        if "embed_factor" not in self.__dict__:
            scale = self._get_embed_scale()
            # PEFT rounds the factor to the adapter's dtype, which is float32 wherever the factor matters.
            self.__dict__["embed_factor"] = None if scale is None else float(scale)
        factor: float | None = self.__dict__["embed_factor"]
        return factor


SelectiveLayer = SelectiveLinear | SelectiveEmbedding
SWAPS: dict[type[nn.Module], type[SelectiveLinear] | type[SelectiveEmbedding]] = {
    LoraLinear: SelectiveLinear,
    LoraEmbedding: SelectiveEmbedding,
}
_OWN_ATTRIBUTES = ("lora_index", "is_output", "embed_factor", "siblings", "sibling_index")


def join_siblings(model: nn.Module) -> None:
    """Let selective layers that read one input run in one kernel call. To be called again when layers are added."""
    for group in find_siblings(model, SelectiveLinear):
        members = tuple(group)
        for index, member in enumerate(members):
            # Past nn.Module.__setattr__: these are no children of the layer.
            member.__dict__.update(siblings=members, sibling_index=index)


def _run(layers: Sequence[SelectiveLinear], x: torch.Tensor, context: ForwardContext) -> Sequence[torch.Tensor]:
    """Base outputs of layers that read x, with their adapters' parts added."""
    # Past nn.Module.__getattr__, which costs more than the rest of this function.
    outputs = call_together([layer._modules["base_layer"] for layer in layers], x)
    # Only lm_head sees other rows than the rest, and it has no siblings.
    plan = context.lora_logits if layers[0].is_output else context.lora
    if plan is None:
        return outputs
    resident = context.lora_weights
    weights = [resident[layer.lora_index] if layer.lora_index >= 0 else None for layer in layers]
    if weights.count(None) < len(weights):
        _check_rows(layers[0], x.numel() // x.shape[-1], plan)
        kernels.add_lora_group_(outputs, x, weights, plan)
    return outputs


def _adapters_of(layer: SelectiveLayer, context: ForwardContext) -> tuple[LoRAPlan | None, LoRALayerWeights | None]:
    plan = context.lora_logits if layer.is_output else context.lora
    if plan is None or layer.lora_index < 0:
        return None, None
    return plan, context.lora_weights[layer.lora_index]


def _check_rows(layer: SelectiveLayer, rows: int, plan: LoRAPlan) -> None:
    if rows != plan.num_rows:
        raise RuntimeError(
            f"{type(layer).__name__} {layer.lora_index} ({layer.in_features} to {layer.out_features}) got {rows} rows, "
            f"but the batch has {plan.num_rows}: a module that drops or reorders rows cannot serve mixed adapters; "
            "leave it out of target_modules"
        )


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


def wrap_module(model: nn.Module, path: str) -> SelectiveLayer:
    """Put a selective layer without adapters around the module at ``path`` of a stock model, and return it.

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
    layer.is_output = module is _output_embeddings(model)
    model.set_submodule(path, layer)
    return layer


def unwrap_module(model: nn.Module, path: str) -> nn.Module:
    """Put the base layer back where ``wrap_module`` put a selective layer, and return it."""
    layer = model.get_submodule(path)
    if not isinstance(layer, (SelectiveLinear, SelectiveEmbedding)):
        return layer
    base: nn.Module = layer.base_layer
    model.set_submodule(path, base)
    return base


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    output: nn.Module | None = getter() if getter is not None else None
    return output
