"""What every fused module has: its class on the instance, and when its kernels run."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from peft_dist.forward_context import current
from peft_dist.kernels.backend import has_triton
from peft_dist.kernels.glue import DTYPES, Glue, implementation

_STATE = "_fusion"


@dataclass(slots=True)
class Fusion:
    """State of one fused module.

    Attributes:
        backend: "triton" or "reference", wherever the tensors are; None: Triton for those on a GPU, else nothing.
        options: What the module's form leaves open.
    """

    backend: str | None
    options: dict[str, Any] = field(default_factory=dict)

    def glue(self, x: torch.Tensor) -> Glue | None:
        """The kernels for x; None where the original code has to run: outside of a pass, or with gradients."""
        if current() is None or torch.is_grad_enabled() or x.dtype not in DTYPES:
            return None
        backend = self.backend
        if backend is None:
            if not x.is_cuda or not has_triton():
                return None
            backend = "triton"
        return implementation(backend)


def fusion_of(module: nn.Module) -> Fusion:
    """The state of a fused module."""
    # Past nn.Module.__getattr__: this runs in every layer of every step.
    return cast(Fusion, module.__dict__[_STATE])


def is_fused(module: nn.Module) -> bool:
    """Whether ``put_on`` was applied to this module."""
    return _STATE in module.__dict__


def put_on(module: nn.Module, mixin: type[nn.Module], fusion: Fusion) -> None:
    """Give a module the class that is ``mixin`` above its own."""
    module.__dict__[_STATE] = fusion
    module.__class__ = fused_class(type(module), mixin)


def take_off(module: nn.Module) -> None:
    """Undo ``put_on``; other modules are left alone."""
    if is_fused(module):
        del module.__dict__[_STATE]
        module.__class__ = cast(Any, type(module)).peft_dist_original


@functools.cache
def fused_class(original: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's class whose ``forward`` is the mixin's. Copies and pickles are the original's."""

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        state = {key: value for key, value in self.__dict__.items() if key != _STATE}
        return copyreg._reconstructor, (original, object, None), state  # type: ignore[attr-defined]

    namespace = {
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__reduce_ex__": __reduce_ex__,
        "forward": functools.wraps(original.forward)(_plain(mixin.forward)),
        "peft_dist_original": original,
    }
    return type(original)(original.__name__, (mixin, original), namespace)


def _plain(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own, so that wrapping it leaves the mixin's as it is."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return call


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """``[..., columns]`` as ``[rows, columns]`` with unit stride between columns."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module does more than its ``forward``."""
    return bool(module._forward_pre_hooks or module._forward_hooks)
