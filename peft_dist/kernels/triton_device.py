"""Where Triton's kernels run, and what they call torch's types."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 before triton's import)."""
    return bool(triton.knobs.runtime.interpret)


def device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes launches inside go to the tensor's GPU; Triton takes the current one otherwise."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def triton_type(dtype: torch.dtype) -> Any:
    """Of float32, bfloat16 and float16."""
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
