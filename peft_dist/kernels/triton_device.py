"""Where Triton's kernels run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 before triton's import)."""
    return bool(triton.knobs.runtime.interpret)


def device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes launches inside go to the tensor's GPU; Triton takes the current one otherwise."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
