"""What Triton would compile for, noted launch by launch, on a machine without a GPU."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import peft_dist.kernels


class Key(NamedTuple):
    """Launches with the same one share a compiled kernel.

    Attributes:
        arguments: Type and specialisation of each argument, in order; values of constants.
        options: Warps, stages and the like.
    """

    kernel: str
    arguments: str
    options: str


class _Noted:
    """In the place of a kernel: runs nothing."""

    def __init__(self, kernel: Any, note: Callable[[Key], None]) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import JITFunction, create_function_from_signature

        names = ("do_not_specialize", "do_not_specialize_on_alignment")
        jitted = JITFunction(kernel.fn, **{name: kernel.kwargs.get(name) for name in names})
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self._bind = create_function_from_signature(jitted.signature, jitted.params, backend)
        self._name, self._note = f"{kernel.fn.__module__}.{kernel.fn.__name__}", note

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **kwargs: Any) -> None:
        _, specialization, options = self._bind(*args, **kwargs)
        self._note(Key(self._name, str(specialization), str(sorted(options.items()))))


def note_launches(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """Have every kernel of ``peft_dist.kernels`` only note what it is launched with, in the list that is returned.

    For processes with Triton's interpreter. Outputs hold anything from then on.
    """
    from triton.runtime.interpreter import InterpretedFunction

    seen: list[Key] = []
    for found in pkgutil.iter_modules(peft_dist.kernels.__path__, "peft_dist.kernels."):
        if "triton" not in found.name and "loop" not in found.name:
            continue
        module = importlib.import_module(found.name)
        for name, value in list(vars(module).items()):
            if isinstance(value, InterpretedFunction):
                monkeypatch.setattr(module, name, _Noted(value, seen.append))
    return seen
