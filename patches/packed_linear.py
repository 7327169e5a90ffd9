"""Linear layers on CPU that multiply with a copy of their weight in the math library's own layout.

torch's libraries (MKL for float32, oneDNN for bfloat16 and float16) rearrange a weight before they multiply
with it, in every call. A ``PackedLinear`` keeps the rearranged copy: with the few rows of a decode step that
is up to three times faster, and costs the weight's memory again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

# MKL lays out for a number of rows; this layout is near the best for all in the range. One or two rows need no
# rearranging (they are matrix-vector products), and many amortise it.
_MKL_LAYOUT_ROWS = 64
_MKL_MIN_ROWS, _MKL_MAX_ROWS = 3, 256

Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""(input, packed weight, weight, bias) to output."""


def _multiply_mkl(
    x: torch.Tensor, packed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    rows = x.numel() // x.shape[-1]
    if not _MKL_MIN_ROWS <= rows <= _MKL_MAX_ROWS:
        return torch.nn.functional.linear(x, weight, bias)
    # The last argument must be the input's own number of rows, or the operator ignores the packed copy.
    return cast(torch.Tensor, torch.ops.mkl._mkl_linear(x, packed, weight, bias, rows))


def _multiply_onednn(
    x: torch.Tensor, packed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if x.numel() == 0:
        return torch.nn.functional.linear(x, weight, bias)
    return cast(torch.Tensor, torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""))


def _has(namespace: str, *operators: str) -> bool:
    return all(hasattr(getattr(torch.ops, namespace), operator) for operator in operators)


def _onednn_has(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not _has("mkldnn", "_reorder_linear_weight", "_linear_pointwise"):
        return False
    check = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    return check is not None and _has("mkldnn", check) and bool(getattr(torch.ops.mkldnn, check)())


def _method(weight: torch.Tensor) -> Multiply | None:
    """How weights of this kind are multiplied packed, or None when this torch build cannot."""
    if weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    if weight.dtype == torch.float32:
        available = torch.backends.mkl.is_available() and _has("mkl", "_mkl_reorder_linear_weight", "_mkl_linear")
        return _multiply_mkl if available else None
    return _multiply_onednn if _onednn_has(weight.dtype) else None


def _pack(weight: torch.Tensor) -> torch.Tensor:
    plain = weight.detach()
    if plain.dtype == torch.float32:
        return cast(torch.Tensor, torch.ops.mkl._mkl_reorder_linear_weight(plain, _MKL_LAYOUT_ROWS))
    return cast(torch.Tensor, torch.ops.mkldnn._reorder_linear_weight(plain, None))


class _Packing:
    """The packed copy of one weight, and what tells whether the weight is still the one that was packed."""

    __slots__ = ("multiply", "packed", "pointer", "version")

    def __init__(self) -> None:
        self.multiply: Multiply | None = None
        self.packed: torch.Tensor | None = None
        self.pointer = self.version = -1

    def __reduce__(self) -> tuple[type[_Packing], tuple[()]]:
        # Packed tensors are opaque to pickle and deepcopy: a copy packs anew when it is first used.
        return _Packing, ()

    def refresh(self, weight: torch.Tensor) -> None:
        self.multiply = _method(weight)
        self.packed = _pack(weight) if self.multiply else None
        self.pointer, self.version = weight.data_ptr(), _version(weight)


def _version(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


class PackedLinear(nn.Linear):
    """``nn.Linear`` whose inference on CPU reads the packed copy; made by ``pack_linear`` from an instance.

    The parameters stay what and where they were. A weight that was replaced, moved or changed in place is
    packed again at the next call; changes through ``weight.data`` leave no trace in torch and need ``repack``.
    With gradients enabled the layer is a plain ``nn.Linear``.
    """

    _packing: _Packing

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, packing = self.weight, self._packing
        if torch.is_grad_enabled():
            return super().forward(input)
        if packing.pointer != weight.data_ptr() or packing.version != _version(weight):
            packing.refresh(weight)
        if packing.multiply is None or input.dtype != weight.dtype or input.shape[-1] != self.in_features:
            return super().forward(input)
        return packing.multiply(input, cast(torch.Tensor, packing.packed), weight, self.bias)


def pack_linear(module: nn.Module) -> bool:
    """Turn an ``nn.Linear`` into a ``PackedLinear`` in place.

    Returns False, and leaves the module alone, when it is not exactly an ``nn.Linear`` or this machine's
    torch cannot multiply its weight packed. A module that is packed already is packed again.
    """
    if type(module) is PackedLinear:
        repack(module)
        return True
    if type(module) is not nn.Linear or _method(module.weight) is None:
        return False
    packing = _Packing()
    packing.refresh(module.weight)
    module.__class__ = PackedLinear
    module.__dict__["_packing"] = packing
    return True


def unpack_linear(module: nn.Module) -> None:
    """Make a packed module the plain ``nn.Linear`` that it was; other modules are left alone."""
    if type(module) is PackedLinear:
        del module.__dict__["_packing"]
        module.__class__ = nn.Linear


def repack(module: nn.Module) -> None:
    """Pack the weight of a packed module again, after a change that torch does not count (``weight.data``)."""
    if type(module) is PackedLinear:
        module._packing.refresh(module.weight)
