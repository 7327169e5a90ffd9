"""PEFT's LoRA layers with a forward pass that serves rows of many adapters at once.

Outside of a ForwardContext each runs PEFT's own code, so training, merging and saving are untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_dist.forward_context import ForwardContext, current
from peft_dist.kernels import lora as kernels
from peft_dist.kernels.lora_beside import ShrinkBeside
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan
from peft_dist.patches.lora_ways import beside, inside, planned, tries_inside
from peft_dist.patches.rank_outputs import Combination
from peft_dist.patches.siblings import find_siblings
from peft_dist.patches.together import call_as_made, call_planned, call_together


class SelectiveLinear(LoraLinear):
    """``peft.tuners.lora.Linear`` whose rows may each belong to another adapter slot.

    Attributes:
        lora_index: Where the layer's weights stand in ``ForwardContext.lora_weights``.
        is_output: The layer sees only the rows whose logits are wanted (``sees_kept_rows``).
        siblings: The layers that are called with the same input, this one among them (``join_siblings``).
        combination: What makes one output of those of several ranks, where the layer is split over them.
    """

    lora_index: int = -1
    is_output: bool = False
    combination: Combination | None = None
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
        if self.combination is None:
            return self._compute(x, *args, **kwargs)
        y = self._compute(self.combination.enter(x), *args, **kwargs)
        return self.combination.leave(y, x)

    def _compute(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        context = current()
        if context is None:
            return super().forward(x, *args, **kwargs)
        # PEFT's hooks pass names; they outlive a call that failed, and the context knows better.
        kwargs.pop("adapter_names", None)
        if args or kwargs:
            raise TypeError(f"a linear layer takes one tensor, not also {[*args, *kwargs]}")
        siblings = self.siblings
        if len(siblings) < 2 or _has_hooks(self):
            return _run([self], x, context)[0]
        return context.shared_output(siblings, self.sibling_index, x, lambda x: _run_together(siblings, x, context))


class SelectiveEmbedding(LoraEmbedding):
    """``peft.tuners.lora.Embedding`` whose rows may each belong to another adapter slot."""

    lora_index: int = -1
    is_output: bool = False
    combination: Combination | None = None

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
        if self.combination is None:
            return self._compute(x, *args, **kwargs)
        y = self._compute(self.combination.enter(x), *args, **kwargs)
        return self.combination.leave(y, x)

    def _compute(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        context = current()
        if context is None:
            return super().forward(x, *args, **kwargs)
        # PEFT's hooks pass names; they outlive a call that failed, and the context knows better.
        kwargs.pop("adapter_names", None)
        [base_layer] = multiplied([self], context)
        y: torch.Tensor = base_layer(x, *args, **kwargs)
        plans = context.lora_plans(self.is_output)
        weights = context.lora_weights[self.lora_index] if plans and self.lora_index >= 0 else None
        if weights is None:
            return y
        ids = x.reshape(-1)
        out = y.reshape(-1, y.shape[-1])
        for plan in plans:
            check_rows(self, len(ids), plan)
            kernels.add_embedding_lora_(out, ids, weights, plan, self._embed_factor())
        return out.view(y.shape)

    def _embed_factor(self) -> float | None:
        """Gemma multiplies its embeddings; read once, because reading a device tensor waits for the device."""
        if "embed_factor" not in self.__dict__:
            scale = self._get_embed_scale()
            # PEFT rounds the factor to the adapter's dtype, which is float32 wherever the factor matters.
            self.__dict__["embed_factor"] = None if scale is None else float(scale)
        factor: float | None = self.__dict__["embed_factor"]
        return factor


SelectiveLayer = SelectiveLinear | SelectiveEmbedding


def join_siblings(model: nn.Module) -> None:
    """Let selective layers that read one input run in one kernel call. To be called again when layers are added."""
    for group in find_siblings(model, SelectiveLinear):
        members = tuple(group)
        for index, member in enumerate(members):
            # Past nn.Module.__setattr__: these are no children of the layer.
            member.__dict__.update(siblings=members, sibling_index=index)


def _has_hooks(layer: SelectiveLinear) -> bool:
    """Whether hooks may change what the layer reads, or have to run when it is called: then it is computed alone."""
    base = layer._modules["base_layer"]
    assert base is not None
    return bool(layer._forward_pre_hooks or base._forward_pre_hooks or base._forward_hooks)


def _run_together(
    siblings: Sequence[SelectiveLinear], x: torch.Tensor, context: ForwardContext
) -> Sequence[torch.Tensor | None]:
    """Outputs of siblings that read x; None for those that are computed alone."""
    layers = [layer for layer in siblings if not _has_hooks(layer)]
    outputs = _run(layers, x, context)
    if len(layers) == len(siblings):
        return outputs
    found = dict(zip(layers, outputs, strict=True))
    return [found.get(layer) for layer in siblings]


def _run(layers: Sequence[SelectiveLinear], x: torch.Tensor, context: ForwardContext) -> Sequence[torch.Tensor]:
    """Base outputs of layers that read x, with their adapters' parts added."""
    # Only the head sees other rows than the rest, and nothing in it has siblings outside of it.
    plans = context.lora_plans(layers[0].is_output)
    if not plans:
        return call_together(multiplied(layers, context), x)
    weights = weights_of(layers, context)
    if weights.count(None) == len(weights):
        return call_together(multiplied(layers, context), x)
    for plan in plans:
        check_rows(layers[0], x.numel() // x.shape[-1], plan)
    below = multiplied(layers, context)
    best = planned(x, weights, plans, context)
    fused = inside(below, x, weights, plans, context) if tries_inside(best) else None
    if fused is not None:
        return fused.split([layer.out_features for layer in layers], dim=-1)
    if best is not None and len(layers) == 1:
        # As where ranks add up their outputs, which nothing that adds parts follows: that is one launch more.
        compute = beside(x, weights, plans, context, best)
        if compute is not None:
            outputs, parts = compute(lambda: call_as_made(below, x))
            return [outputs[0].add_(parts[0])]
    begun = kernels.begin_lora(x, weights, plans[0])
    outputs = call_planned(below, x, with_adapters=True)
    add_parts(outputs, x, weights, plans, begun)
    return outputs


def is_seen(layer: SelectiveLinear) -> bool:
    """Whether the layer's own output has to be there, not only what becomes of it."""
    return (
        layer.combination is not None or bool(layer._forward_hooks) or "forward" in layer.__dict__ or _has_hooks(layer)
    )


def weights_of(layers: Sequence[SelectiveLinear], context: ForwardContext) -> list[LoRALayerWeights | None]:
    resident = context.lora_weights
    return [resident[layer.lora_index] if layer.lora_index >= 0 else None for layer in layers]


def add_parts(
    outputs: Sequence[torch.Tensor],
    x: torch.Tensor,
    weights: Sequence[LoRALayerWeights | None],
    plans: Sequence[LoRAPlan],
    begun: ShrinkBeside | None,
) -> None:
    """Add the parts of all plans, the first of which may have been begun."""
    if begun is not None:
        begun.finish_(outputs)
    for plan in plans[begun is not None :]:
        kernels.add_lora_group_(outputs, x, weights, plan)


def multiplied(layers: Sequence[SelectiveLayer], context: ForwardContext) -> list[nn.Module]:
    """The modules that a pass runs below these layers: the base layers, or their twins with merged weights."""
    # Past nn.Module.__getattr__, which costs more than the rest of this function.
    modules = [cast(nn.Module, layer._modules["base_layer"]) for layer in layers]
    if context.merged is None:
        return modules
    twins = context.merged.twins
    return [twins.get(module, module) for module in modules]


def check_rows(layer: SelectiveLayer, rows: int, plan: LoRAPlan) -> None:
    if rows != plan.num_rows:
        raise RuntimeError(
            f"{type(layer).__name__} {layer.lora_index} ({layer.in_features} to {layer.out_features}) got {rows} rows, "
            f"but the batch has {plan.num_rows}: a module that drops or reorders rows cannot serve mixed adapters; "
            "leave it out of target_modules"
        )
