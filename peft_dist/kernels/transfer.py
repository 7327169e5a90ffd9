"""From host memory to a device, without waiting for either."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

# What lies between tensors goes along with them, up to so much of their own bytes.
_MOST_BETWEEN = 0.25
_ALIGNMENT = 16


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor``, which lies in host memory; for a GPU its copy is queued, so that nobody waits."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Moved(NamedTuple):
    """Where the copy of a tensor lies.

    Attributes:
        memory: What holds it, and maybe others.
        address: Of its first element.
        strides: As of the tensor, in elements.
    """

    memory: torch.Tensor
    address: int
    strides: tuple[int, ...]


def move_together(tensors: Sequence[torch.Tensor], move: Callable[[torch.Tensor], torch.Tensor]) -> list[Moved]:
    """Copies of tensors, made by one call of ``move`` for each stretch of host memory that they share.

    An adapter's hundreds of tensors are views of one buffer; one by one, each copy to a device is a call that asks for
    the interpreter, which the thread that launches the steps needs.

    Args:
        tensors: Of any type and place. Those that are not contiguous, or not in host memory, are moved one by one, and
            so are those with much else between them.
        move: What makes a copy.

    Returns:
        In the same order. Views would cost what they spare: hundreds of calls.
    """
    moved: dict[int, Moved] = {}
    for places in _by_storage(tensors):
        first = min(_start(tensors[place]) for place in places) // _ALIGNMENT * _ALIGNMENT
        last = max(_start(tensors[place]) + tensors[place].nbytes for place in places)
        own = sum(tensors[place].nbytes for place in places)
        if len(places) == 1 or last - first > (1 + _MOST_BETWEEN) * own + _ALIGNMENT:
            for place in places:
                copy = move(tensors[place])
                moved[place] = Moved(copy, copy.data_ptr(), copy.stride())
            continue
        stretch = move(_bytes_of(tensors[places[0]], first, last))
        begin = stretch.data_ptr() - first
        for place in places:
            moved[place] = Moved(stretch, begin + _start(tensors[place]), tensors[place].stride())
    return [moved[place] for place in range(len(tensors))]


def _by_storage(tensors: Sequence[torch.Tensor]) -> Iterable[list[int]]:
    """Places in ``tensors``: together those that are plain views of the same host memory."""
    found: defaultdict[object, list[int]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        is_plain = tensor.is_contiguous() and tensor.device.type == "cpu" and tensor.numel()
        found[tensor.untyped_storage().data_ptr() if is_plain else (place,)].append(place)
    return found.values()


def _start(tensor: torch.Tensor) -> int:
    """Bytes from the beginning of its storage."""
    return int(tensor.storage_offset()) * tensor.itemsize


def _bytes_of(tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """uint8 ``[last - first]`` of the tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), first, (last - first,), (1,))
