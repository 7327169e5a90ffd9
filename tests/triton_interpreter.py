"""Triton 3.6's interpreter, with what it lacks for our kernels."""

from __future__ import annotations

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
