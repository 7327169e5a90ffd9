"""Linear layers on CPU that multiply with a copy of their weight in oneDNN's own layout.

torch's libraries rearrange a weight before they multiply with it, in every call. A ``PackedLinear`` keeps the
rearranged copy: with the few rows of a decode step that is up to four times faster, and costs the weight's memory
again. Layers that read one input (q/k/v, gate/up) are packed as one and multiplied in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from peft_dist.forward_context import current


def _can_pack(weight: torch.Tensor) -> bool:
    """Whether this torch build multiplies weights of this kind packed."""
    operators = torch.ops.mkldnn
    if weight.device.type != "cpu" or not weight.is_contiguous() or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(operators, "_reorder_linear_weight") or not hasattr(operators, "_linear_pointwise"):
        return False
    if weight.dtype == torch.float32:
        return True
    check = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(weight.dtype)
    return check is not None and hasattr(operators, check) and bool(getattr(operators, check)())


_State = tuple[object, ...]


def _state(layer: nn.Linear) -> _State:
    """Changes with the layer's tensors, as far as torch lets one see it."""
    # Past nn.Module.__getattr__: this runs for every layer of every step.
    parameters = layer._parameters
    weight, bias = cast(torch.Tensor, parameters["weight"]), parameters["bias"]
    if bias is None:
        return weight.data_ptr(), _version(weight)
    return weight.data_ptr(), _version(weight), bias.data_ptr(), _version(bias)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Packing:
    """The packed copy of the weights of one or more layers, and what tells whether they are still the same.

    Attributes:
        packed: Their rows below one another; None where this machine cannot multiply them packed.
        sizes: ``out_features`` of each.
    """

    __slots__ = ("bias", "dtype", "layers", "packed", "sizes", "states")

    def __init__(self, layers: Sequence[PackedLinear] = ()) -> None:
        self.layers = tuple(layers)
        self.sizes = [layer.out_features for layer in layers]
        self.packed: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.dtype: torch.dtype | None = None
        self.states: list[_State] = [()] * len(self.layers)

    def __reduce__(self) -> tuple[type[Packing], tuple[()]]:
        # Packed tensors are opaque to pickle and deepcopy: a copied layer packs anew, alone, when it is first used.
        return Packing, ()

    def multiply(self, x: torch.Tensor) -> torch.Tensor | None:
        """Outputs of all layers beside one another; None where the plain layers must run.

        Packs again when a weight was replaced, moved or changed in place. While the pass has merged weights for
        these layers, multiplies with those.
        """
        merged = _merged(self)
        if merged is not None:
            return _multiply(x, merged, self.bias)
        for layer, state in zip(self.layers, self.states, strict=True):
            if _state(layer) != state:
                self.refresh()
                break
        packed = self.packed
        if packed is None or x.dtype != self.dtype or x.shape[-1] != self.layers[0].in_features:
            return None
        return _multiply(x, packed, self.bias)

    def outputs(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Of each layer."""
        joined = self.multiply(x)
        if joined is None:
            return [nn.Linear.forward(layer, x) for layer in self.layers]
        return joined.split(self.sizes, dim=-1)

    def refresh(self) -> None:
        """Pack again. Where this fails, the next multiplication tries once more."""
        self.packed = self.bias = None
        self.states = [()] * len(self.layers)
        states = [_state(layer) for layer in self.layers]
        weights = [layer.weight.detach() for layer in self.layers]
        alike = len({(weight.dtype, weight.shape[1]) for weight in weights}) == 1
        if alike and all(_can_pack(weight) for weight in weights):
            self.dtype = weights[0].dtype
            self.packed = pack_weight(weights[0] if len(weights) == 1 else torch.cat(weights))
            self.bias = self._joined_bias()
        self.states = states

    def _joined_bias(self) -> torch.Tensor | None:
        if len(self.layers) == 1:
            return self.layers[0].bias
        if all(layer.bias is None for layer in self.layers):
            return None
        zeros = [layer.weight.new_zeros(layer.out_features) for layer in self.layers]
        return torch.cat(
            [z if layer.bias is None else layer.bias.detach() for layer, z in zip(self.layers, zeros, strict=True)]
        )


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """A copy of ``[out, in]``, contiguous, in oneDNN's layout: opaque to everything but its multiplication."""
    return cast(torch.Tensor, torch.ops.mkldnn._reorder_linear_weight(weight, None))


def _multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return cast(torch.Tensor, torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""))


def _merged(packing: Packing) -> torch.Tensor | None:
    context = current()
    return None if context is None or context.merged is None else context.merged.packed.get(packing)


class PackedLinear(nn.Linear):
    """``nn.Linear`` whose inference on CPU reads the packed copy; made by ``pack_linears`` from an instance.

    The parameters stay what and where they were. A weight that was replaced, moved or changed in place is
    packed again at the next call; changes through ``weight.data`` leave no trace in torch and need ``repack``.
    With gradients enabled the layer is a plain ``nn.Linear``; so is one of several packed as one outside of a
    ForwardContext, where nothing can be kept for the others.
    """

    _packing: Packing
    _index: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        packing = self._packing
        if not packing.layers:
            packing = self.__dict__["_packing"] = Packing([self])
            self.__dict__["_index"] = 0
        if (torch.is_grad_enabled() or not input.numel()) and _merged(packing) is None:
            return super().forward(input)
        if len(packing.layers) == 1:
            output = packing.multiply(input)
            return super().forward(input) if output is None else output
        context = current()
        if context is None:
            return super().forward(input)
        return context.shared_output(packing, self._index, input, packing.outputs)


def pack_linears(modules: Sequence[nn.Module]) -> bool:
    """Turn ``nn.Linear`` modules, which are called with one and the same input, into packed ones in place.

    Returns False, and leaves them alone, when one is not exactly an ``nn.Linear``, when their inputs differ in
    width or type, or this machine's torch cannot multiply their weights packed. Packed modules are packed again.
    """
    for module in modules:
        if type(module) not in (nn.Linear, PackedLinear) or not _can_pack(module.weight):
            return False
    if len({(module.weight.dtype, module.weight.shape[1]) for module in modules}) != 1:
        return False
    for module in modules:
        module.__class__ = PackedLinear
    packing = Packing(cast(Sequence[PackedLinear], modules))
    packing.refresh()
    for index, module in enumerate(modules):
        module.__dict__.update(_packing=packing, _index=index)
    return True


def pack_linear(module: nn.Module) -> bool:
    """``pack_linears`` for one module."""
    return pack_linears([module])


def packing_of(module: nn.Module) -> Packing | None:
    """How a module is packed now; None where it is multiplied with its plain weight."""
    if type(module) is not PackedLinear or not module._packing.layers or module._packing.packed is None:
        return None
    return module._packing


def unpack_linear(module: nn.Module) -> None:
    """Make a packed module the plain ``nn.Linear`` that it was; other modules are left alone."""
    if type(module) is PackedLinear:
        del module.__dict__["_packing"], module.__dict__["_index"]
        module.__class__ = nn.Linear


def repack(module: nn.Module) -> None:
    """Pack the weight of a packed module again, after a change that torch does not count (``weight.data``)."""
    if type(module) is PackedLinear:
        module._packing.refresh()
