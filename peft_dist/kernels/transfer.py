"""From host memory to a device, without waiting for either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

# What lies between tensors goes along with them, up to so much of their own bytes.
_MOST_BETWEEN = 0.25
_ALIGNMENT = 16


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor``, which lies in host memory; for a GPU its copy is queued, so that nobody waits."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def warm_up_pinned(device: torch.device) -> None:
    """Have torch keep the pinned memory that small copies to a GPU go by (``to_device``): see ``HostBuffer`` for what
    asking CUDA for it costs while steps run."""
    if device.type == "cuda":
        # It is rounded up to powers of two. Several: some copies are under way.
        held = [torch.empty(1 << power, dtype=torch.uint8, pin_memory=True) for power in range(9, 20) for _ in range(3)]
        del held


class Moved(NamedTuple):
    """Where copies of some tensors lie, contiguous.

    Attributes:
        memory: What holds them.
        addresses: int64 ``[tensors]``, of their first elements.
    """

    memory: list[torch.Tensor]
    addresses: np.ndarray


def move_together(tensors: Sequence[torch.Tensor], move: Callable[[torch.Tensor], torch.Tensor]) -> Moved:
    """Copies of tensors, made by one call of ``move`` where they share a stretch of host memory, else by one for each.

    An adapter's hundreds of tensors are views of one buffer; one by one, each copy to a device is a call that asks for
    the interpreter, which the thread that launches the steps needs. So would be a view for each on the device.

    Args:
        tensors: Of any type and place. All are moved one by one where one of them is not contiguous or not in host
            memory, and where much else lies between them.
        move: What makes a copy.
    """
    starts = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
    if len(tensors) < 2 or not all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors):
        return _move_each(tensors, move)
    sizes = np.array([tensor.nbytes for tensor in tensors], np.int64)
    storage = tensors[0].untyped_storage()
    begin = storage.data_ptr()
    first = (int(starts.min()) - begin) // _ALIGNMENT * _ALIGNMENT
    last = int((starts + sizes).max()) - begin
    # Whatever lies within this storage is a view of it.
    if first < 0 or last > storage.nbytes() or last - first > (1 + _MOST_BETWEEN) * sizes.sum() + _ALIGNMENT:
        return _move_each(tensors, move)
    stretch = move(torch.empty(0, dtype=torch.uint8).set_(storage, first, (last - first,), (1,)))
    return Moved([stretch], starts - (begin + first) + stretch.data_ptr())


def _move_each(tensors: Sequence[torch.Tensor], move: Callable[[torch.Tensor], torch.Tensor]) -> Moved:
    copies = [move(tensor).contiguous() for tensor in tensors]
    return Moved(copies, np.array([copy.data_ptr() for copy in copies], np.int64))
