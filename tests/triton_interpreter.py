"""Triton 3.6's interpreter, with what it lacks for our kernels, and without what most of its time goes to."""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import Any

import numpy as np


@cache
def mend() -> None:
    """Once a process: let loops run to bounds that a kernel computes, and products take bfloat16.

    It takes ``int()`` of an array of one element, which numpy 2.4 refuses, and multiplies the bits of bfloat16, which
    it keeps as integers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widened(operand: Any) -> Any:
        if operand.dtype != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, widened(a), widened(b), *others)

    interpreter._patch_lang_tensor = patch_tensor
    interpreter.InterpreterBuilder.create_dot = create_dot
    _hurry()


def _hurry() -> None:
    """Remember what is found out again at every launch, call and operation; no result is another one."""
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    packages = (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)
    builtins = {
        id(package): [(name, one) for name, one in inspect.getmembers(package) if tl.core.is_builtin(one)]
        for package in packages
    }

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name, builtin in builtins[id(package)]:
            # What a kernel calls finds them as the kernel's launch left them.
            if getattr(package, name) is builtin:
                interpreter._patch_attr(package, name, builtin, builder, scope)

    dtype_of = interpreter._get_np_dtype
    dtypes: dict[str, np.dtype[Any]] = {}

    def known_dtype(dtype: Any) -> np.dtype[Any]:
        if (found := dtypes.get(dtype.name)) is None:
            found = dtypes[dtype.name] = dtype_of(dtype)
        return found

    shapes: dict[str, tuple[Any, Any]] = {}

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        if (found := shapes.get(type.name)) is None:
            sizes = type.shape if type.is_block() else ()
            number = tl.constexpr(math.prod(sizes))
            found = shapes[type.name] = number, tl.tuple([tl.constexpr(size) for size in sizes])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = found

    # Sums are looked at for an overflow, and nobody is told of one.
    assert not interpreter.interpreter_builder.options.debug
    interpreter._patch_builtin = patch_builtin
    interpreter._get_np_dtype = known_dtype
    tl.tensor.__init__ = make_tensor
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, operation: None
