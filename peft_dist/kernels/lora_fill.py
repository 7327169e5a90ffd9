"""An adapter's matrices on their way from where they were read into the pool's pages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from peft_dist.kernels.backend import has_triton
from peft_dist.kernels.lora_layer import PooledLayer
from peft_dist.kernels.transfer import Moved, move_together

Entry = tuple[PooledLayer, Sequence[int], torch.Tensor, torch.Tensor]
"""A layer, pages of it, and what belongs there: A ``[r, in]`` and B ``[out, r]``, of any float type."""


def fill_pages(entries: Sequence[Entry], device: torch.device) -> None:
    """Copy matrices into pages, all of one pool on ``device``; on a GPU, on its current stream, and nobody waits.

    What was read into one buffer goes over the bus as it lies there, and is turned and cast by one launch.
    """
    if device.type != "cuda" or not has_triton():
        copies = [copy for entry in entries for copy in _copies(*entry)]
        # One call: copy by copy, this thread would ask for the interpreter, which the model's thread needs, anew.
        if copies:
            torch._foreach_copy_([target for target, _ in copies], [source for _, source in copies])
        return
    moved = move_together(
        [part for *_, A, B in entries for part in (A, B)], lambda part: part.to(device, non_blocking=True)
    )
    fill_from_device(entries, moved)


def fill_from_device(entries: Sequence[Entry], moved: Sequence[Moved]) -> None:
    """Copy what was moved, A and B of each entry in turn; with Triton.

    What holds it may be freed once this has returned: its memory is given out anew on the same stream, or later.
    """
    from peft_dist.kernels.lora_fill_triton import Rows, fill_rows

    rows: defaultdict[torch.dtype, list[Rows]] = defaultdict(list)
    target = None
    places = iter(moved)
    for layer, pages, A, B in entries:
        held = layer.weights
        target = held.A
        # B lies turned in its pages.
        for pool, source, part, (row, column) in ((held.A, A, next(places), (0, 1)), (held.B, B, next(places), (1, 0))):
            width, start = pool.shape[1], pool.data_ptr()
            strides = part.strides[row], part.strides[column]
            for first, count, done in layer.segments(pages, len(A)):
                there = part.address + done * strides[0] * source.itemsize
                here = start + first * width * pool.itemsize
                rows[source.dtype].append(Rows(here, there, count, width, *strides))
    for dtype, some in rows.items():
        assert target is not None, "rows are some layer's"
        fill_rows(some, dtype, target)


def _copies(
    layer: PooledLayer, pages: Sequence[int], A: torch.Tensor, B: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(to, from)."""
    for first, count, done in layer.segments(pages, len(A)):
        for target, source in ((layer.weights.A, A), (layer.weights.B, B.T)):
            yield target[first : first + count], source[done : done + count]


def rehearse_fill(pool: torch.Tensor) -> None:
    """Have what fills pages of the type of ``pool``, on its device, compiled before the first adapter comes."""
    from peft_dist.kernels.lora_fill_triton import Rows, fill_rows

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fill_rows([Rows(0, 0, 0, 1, 1, 1)], dtype, pool)
