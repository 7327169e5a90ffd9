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
from peft_dist.kernels.glue import Activation, Glue, implementation
from peft_dist.kernels.lora_beside import ShrinkBeside
from peft_dist.kernels.lora_parts_beside import PartsBeside
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan
from peft_dist.patches.rank_outputs import Combination
from peft_dist.patches.siblings import find_siblings
from peft_dist.patches.together import call_as_made, call_together, multiply_few, plain_weight


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
        [base_layer] = _multiplied([self], context)
        y: torch.Tensor = base_layer(x, *args, **kwargs)
        plans = context.lora_plans(self.is_output)
        weights = context.lora_weights[self.lora_index] if plans and self.lora_index >= 0 else None
        if weights is None:
            return y
        ids = x.reshape(-1)
        out = y.reshape(-1, y.shape[-1])
        for plan in plans:
            _check_rows(self, len(ids), plan)
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
        return call_together(_multiplied(layers, context), x)
    weights = _weights_of(layers, context)
    if weights.count(None) == len(weights):
        return call_together(_multiplied(layers, context), x)
    for plan in plans:
        _check_rows(layers[0], x.numel() // x.shape[-1], plan)
    fused = _try_fused(layers, x, weights, plans, context)
    if fused is not None:
        return fused.split([layer.out_features for layer in layers], dim=-1)
    begun = kernels.begin_lora(x, weights, plans[0])
    outputs = call_as_made(_multiplied(layers, context), x)
    _add(outputs, x, weights, plans, begun)
    return outputs


def run_gated(
    gate: nn.Module, up: nn.Module, x: torch.Tensor, activation: Activation, glue: Glue | None = None
) -> torch.Tensor | None:
    """``activation(gate(x)) * up(x)`` with the adapters' parts added in the pass that the activation takes, or all of
    it in one launch.

    None, with nothing computed, where neither is to be had: without kernels of Triton, for many rows without adapters,
    and for modules that are no siblings, or whose outputs somebody else sees.

    Args:
        activation: "silu" or "gelu_tanh".
        glue: For an activation that is a pass of its own; None: Triton's.
    """
    context = current()
    if context is None:
        return None
    if type(gate) is not SelectiveLinear or type(up) is not SelectiveLinear:
        return multiply_few([gate, up], x, activation)
    layers = gate.siblings
    if len(layers) != 2 or layers[0] is not gate or layers[1] is not up or any(map(_is_seen, layers)):
        return None
    plans = context.lora_plans(gate.is_output)
    weights = _weights_of(layers, context) if plans else []
    if weights.count(None) == len(weights):
        return multiply_few(_multiplied(layers, context), x, activation)
    beside = _parts_beside(x, weights, plans, context)
    if beside is None and not kernels.has_gate(x, weights, plans[-1]):
        return None
    for plan in plans:
        _check_rows(gate, x.numel() // x.shape[-1], plan)
    fused = _try_fused(layers, x, weights, plans, context, activation)
    if fused is not None:
        return fused
    if beside is not None:
        below = _multiplied(layers, context)
        wide, parts = beside.compute(x, weights, plans[0], lambda: call_as_made(below, x))
        gate_rows, up_rows, *added = (t.reshape(-1, t.shape[-1]) for t in (*wide, *parts))
        glue = glue or implementation("triton")
        return glue.gated(gate_rows, up_rows, activation, added).view(wide[0].shape)
    begun = kernels.begin_lora(x, weights, plans[0])
    outputs = call_as_made(_multiplied(layers, context), x)
    if len(plans) > 1:
        _add(outputs, x, weights, plans[:-1], begun)
        begun = None
    return kernels.lora_gate(outputs[0], outputs[1], x, weights, plans[-1], activation, begun)


def run_apart(
    modules: Sequence[nn.Module], x: torch.Tensor
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor] | None] | None:
    """Outputs of modules that read x, and the adapters' parts for the caller to add: None where the outputs have them.

    None, with nothing computed, where the pass adds parts at once (``PartsBeside``), and for modules that are no
    siblings, or whose outputs somebody else sees.
    """
    context = current()
    if context is None or context.parts_beside is None:
        return None
    if any(type(module) is not SelectiveLinear for module in modules):
        return None
    layers = cast(Sequence[SelectiveLinear], modules)
    siblings = layers[0].siblings or tuple(layers)
    if len(siblings) != len(layers) or any(a is not b for a, b in zip(siblings, layers, strict=True)):
        return None
    plans = context.lora_plans(layers[0].is_output)
    if any(map(_is_seen, layers)):
        return None
    weights = _weights_of(layers, context)
    beside = _parts_beside(x, weights, plans, context)
    if beside is None:
        return None
    _check_rows(layers[0], x.numel() // x.shape[-1], plans[0])
    fused = _try_fused(layers, x, weights, plans, context)
    if fused is not None:
        return fused.split([layer.out_features for layer in layers], dim=-1), None
    below = _multiplied(layers, context)
    return beside.compute(x, weights, plans[0], lambda: call_as_made(below, x))


def _parts_beside(
    x: torch.Tensor, weights: Sequence[LoRALayerWeights | None], plans: Sequence[LoRAPlan], context: ForwardContext
) -> PartsBeside | None:
    """What computes the parts of layers that read x beside their products; None where parts are added at once."""
    beside = context.parts_beside
    return beside if beside is not None and len(plans) == 1 and beside.takes(x, weights, plans[0]) else None


def run_before_sum(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A module's output, of which the adapters' part is handed to a caller that takes it (``takes_part``)."""
    context = current()
    found = run_apart([module], x) if context is not None and context.takes_part else None
    if context is None or found is None:
        return call_together([module], x)[0]
    outputs, parts = found
    if parts is not None:
        context.hand_part(outputs[0], parts[0])
    return outputs[0]


def _try_fused(
    layers: Sequence[SelectiveLinear],
    x: torch.Tensor,
    weights: Sequence[LoRALayerWeights | None],
    plans: Sequence[LoRAPlan],
    context: ForwardContext,
    activation: Activation | None = None,
) -> torch.Tensor | None:
    """The layers with their adapters in one launch, where the pass has few rows (``FewRows.add_lora``)."""
    if context.few_rows is None or len(plans) > 1 or not plans[0].fuses:
        return None
    weight = plain_weight(_multiplied(layers, context), context)
    return None if weight is None else context.few_rows.add_lora(x, weight, weights, plans[0], activation)


def _is_seen(layer: SelectiveLinear) -> bool:
    """Whether the layer's own output has to be there, not only what becomes of it."""
    return (
        layer.combination is not None or bool(layer._forward_hooks) or "forward" in layer.__dict__ or _has_hooks(layer)
    )


def _weights_of(layers: Sequence[SelectiveLinear], context: ForwardContext) -> list[LoRALayerWeights | None]:
    resident = context.lora_weights
    return [resident[layer.lora_index] if layer.lora_index >= 0 else None for layer in layers]


def _add(
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


def _multiplied(layers: Sequence[SelectiveLayer], context: ForwardContext) -> list[nn.Module]:
    """The modules that a pass runs below these layers: the base layers, or their twins with merged weights."""
    # Past nn.Module.__getattr__, which costs more than the rest of this function.
    modules = [cast(nn.Module, layer._modules["base_layer"]) for layer in layers]
    if context.merged is None:
        return modules
    twins = context.merged.twins
    return [twins.get(module, module) for module in modules]


def _check_rows(layer: SelectiveLayer, rows: int, plan: LoRAPlan) -> None:
    if rows != plan.num_rows:
        raise RuntimeError(
            f"{type(layer).__name__} {layer.lora_index} ({layer.in_features} to {layer.out_features}) got {rows} rows, "
            f"but the batch has {plan.num_rows}: a module that drops or reorders rows cannot serve mixed adapters; "
            "leave it out of target_modules"
        )
