"""Linear layers that read one input (q/k/v, gate/up) with their weights in one buffer: one multiplication for all.

The original Parameters become views of the buffer's rows, so that ``state_dict``, saving, training and whatever else
reads or writes them sees what it saw, and no weight is in memory twice.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex, cast

import torch
from torch import nn
from torch.nn import functional

from peft_dist.forward_context import current

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Joint:
    """The buffer that the weights of several layers are rows of.

    Attributes:
        layers: In the order of their rows.
        sizes: ``out_features`` of each.
        weight: ``[sum of sizes, in_features]``; None where the Parameters are no views of one buffer.
        bias: ``[sum of sizes]``, of which the bias Parameters are views, zero for layers without one.
    """

    __slots__ = ("bias", "layers", "sizes", "weight")

    def __init__(self, layers: Sequence[JoinedLinear]) -> None:
        self.layers = tuple(layers)
        self.sizes = [layer.out_features for layer in layers]
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    @property
    def is_intact(self) -> bool:
        """Whether every Parameter is still a view of the buffer: none was replaced or moved."""
        weight, bias = self.weight, self.bias
        if weight is None:
            return False
        place = weight.data_ptr()
        row = weight.stride(0) * weight.element_size()
        bias_place = 0 if bias is None else bias.data_ptr()
        for layer, size in zip(self.layers, self.sizes, strict=True):
            # Past nn.Module.__getattr__: this runs for every layer of every step.
            parameters = layer._parameters
            if cast(torch.Tensor, parameters["weight"]).data_ptr() != place:
                return False
            if parameters["bias"] is not None and parameters["bias"].data_ptr() != bias_place:
                return False
            place += size * row
            if bias is not None:
                bias_place += size * bias.element_size()
        return True

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Of each layer, columns of one tensor. With merged weights where the pass has some for these layers."""
        context = current()
        merged = None if context is None or context.merged is None else context.merged.joined.get(self)
        if merged is None and not self.is_intact:
            return [nn.Linear.forward(layer, x) for layer in self.layers]
        weight = self.weight if merged is None else merged
        assert weight is not None
        return functional.linear(x, weight, self._whole_bias()).split(self.sizes, dim=-1)

    def _whole_bias(self) -> torch.Tensor | None:
        if self.bias is None or self.is_intact:
            return self.bias
        pieces = [
            p if (p := layer.bias) is not None else layer.weight.new_zeros(layer.out_features) for layer in self.layers
        ]
        return torch.cat(pieces)

    def join(self) -> None:
        """Move the Parameters into a new buffer, one by one."""
        like = self.layers[0].weight
        with torch.inference_mode(False), torch.no_grad():
            weight = torch.empty(sum(self.sizes), like.shape[1], dtype=like.dtype, device=like.device)
            _become_views([layer.weight for layer in self.layers], weight.split(self.sizes))
            bias = None
            if any(layer.bias is not None for layer in self.layers):
                bias = torch.zeros(sum(self.sizes), dtype=like.dtype, device=like.device)
                _become_views([layer.bias for layer in self.layers], bias.split(self.sizes))
        self.weight, self.bias = weight, bias

    def part(self) -> None:
        """Give every Parameter that is a view of the buffer memory of its own."""
        with torch.inference_mode(False), torch.no_grad():
            for layer in self.layers:
                for parameter, buffer in ((layer.weight, self.weight), (layer.bias, self.bias)):
                    if parameter is not None and buffer is not None and _shares(parameter, buffer):
                        parameter.data = parameter.data.clone()
        self.weight = self.bias = None

    def follow(self) -> None:
        """Join again, in new memory, once all layers were moved or cast; until the last one is, wait."""
        weight = self.weight
        if weight is not None and (self.is_intact or any(_shares(layer.weight, weight) for layer in self.layers)):
            return
        self.weight = self.bias = None
        if reason_against(self.layers) is None:
            self.join()


def _become_views(parameters: Sequence[nn.Parameter | None], views: Sequence[torch.Tensor]) -> None:
    for parameter, view in zip(parameters, views, strict=True):
        if parameter is not None:
            view.copy_(parameter)
            parameter.data = view


def _shares(tensor: torch.Tensor, buffer: torch.Tensor) -> bool:
    if tensor.device != buffer.device or tensor.is_meta:
        return False
    return tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


class JoinedLinear(nn.Linear):
    """``nn.Linear`` that is computed together with its siblings inside a ForwardContext; made by ``join_linears``.

    Elsewhere, and with gradients enabled, it is a plain ``nn.Linear``. After a Parameter was replaced or moved alone
    every layer multiplies by itself; after ``model.to(...)`` they are joined again. Copies and pickles are plain.
    """

    _joint: Joint
    _index: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        joint = self._joint
        context = current()
        if context is None:
            return super().forward(input)
        if torch.is_grad_enabled() and (context.merged is None or joint not in context.merged.joined):
            return super().forward(input)
        return context.shared_output(joint, self._index, input, joint.outputs)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        state = {key: value for key, value in self.__dict__.items() if key not in ("_joint", "_index")}
        return copyreg._reconstructor, (nn.Linear, object, None), state  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> JoinedLinear:
        super()._apply(fn, recurse)
        self._joint.follow()
        return self


def reason_against(layers: Sequence[nn.Module]) -> str | None:
    """Why the weights of these modules cannot lie in one buffer; None when they can."""
    kinds = set()
    for layer in layers:
        if type(layer) not in (nn.Linear, JoinedLinear):
            return f"one is a {type(layer).__name__}, not nn.Linear"
        if "forward" in layer.__dict__:
            return "something else has replaced the forward of one"
        for tensor in (layer.weight, layer.bias):
            if tensor is not None and (type(tensor) is not nn.Parameter or type(tensor.data) is not torch.Tensor):
                return "a parameter of one is no plain tensor"
            if tensor is not None and (tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in _DTYPES):
                return "a parameter of one is not in memory as floats"
            if tensor is not None:
                kinds.add((tensor.dtype, tensor.device, layer.in_features))
    if len(kinds) != 1:
        return "they differ in dtype, device or width of the input"
    return None


def join_linears(layers: Sequence[nn.Module]) -> bool:
    """Turn ``nn.Linear`` modules that are called with one and the same input into joined ones, in place.

    Two or more, none of whose parameters is another module's as well. While it runs, these layers' weights alone are
    in memory twice. False, with nothing changed, where that is not possible (``reason_against``).
    """
    if len(layers) < 2 or any(joint_of(layer) for layer in layers) or reason_against(layers):
        return False
    linears = cast(Sequence[JoinedLinear], layers)
    joint = Joint(linears)
    joint.join()
    for index, layer in enumerate(linears):
        layer.__class__ = JoinedLinear
        layer.__dict__.update(_joint=joint, _index=index)
    return True


def joint_of(module: nn.Module) -> Joint | None:
    """What a module's weight is a part of; None for a module that is not joined."""
    return module._joint if type(module) is JoinedLinear else None


def part_linear(module: nn.Module) -> None:
    """Make the plain ``nn.Linear`` that it was of a joined module, and of those joined with it; others are left alone.

    Every Parameter is the object that it was, with the same values in memory of its own.
    """
    if type(module) is not JoinedLinear:
        return
    joint = module._joint
    joint.part()
    for layer in joint.layers:
        del layer.__dict__["_joint"], layer.__dict__["_index"]
        layer.__class__ = nn.Linear
