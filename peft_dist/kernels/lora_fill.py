"""An adapter's matrices on their way from where they were read into the pool's pages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from peft_dist.kernels.backend import has_triton
from peft_dist.kernels.lora_layer import PooledLayer
from peft_dist.kernels.page_allocator import page_table
from peft_dist.kernels.transfer import Moved, move_together


class Entry(NamedTuple):
    """A layer, pages of it, and what belongs there: A ``[r, in]`` and B ``[out, r]``, of any float types."""

    layer: PooledLayer
    pages: Sequence[int]
    A: torch.Tensor
    B: torch.Tensor


def fill_pages(entries: Sequence[Entry], device: torch.device) -> None:
    """Copy matrices into pages, all of one pool on ``device``; on a GPU, on its current stream, and nobody waits.

    What was read into one buffer goes over the bus as it lies there, and is turned and cast by one launch.
    """
    if device.type != "cuda" or not has_triton():
        copies = [copy for entry in entries for copy in _copies(entry)]
        # One call: copy by copy, this thread would ask for the interpreter, which the model's thread needs, anew.
        if copies:
            torch._foreach_copy_([target for target, _ in copies], [source for _, source in copies])
        return
    parts = [part for entry in entries for part in (entry.A, entry.B)]
    fill_from_device(entries, move_together(parts, lambda part: part.to(device, non_blocking=True)))


def fill_from_device(entries: Sequence[Entry], moved: Moved) -> None:
    """Copy what was moved, A and B of each entry in turn; with Triton.

    What holds it may be freed once this has returned: its memory is given out anew on the same stream, or later.
    All entries at once: in Python's steps one by one they would keep the interpreter from the thread of the steps.
    """
    from peft_dist.kernels.lora_fill_triton import fill_rows

    if not entries:
        return
    held = [entry.layer.weights for entry in entries]
    page_rows, target = held[0].page_rows, held[0].A
    ranks = np.array([len(entry.A) for entry in entries], np.int64)
    pages = page_table([entry.pages for entry in entries])
    before = page_rows * np.arange(pages.shape[1])
    counts = np.clip(ranks[:, None] - before, 0, page_rows)
    ones = np.ones_like(ranks)
    by_type: defaultdict[torch.dtype, list[np.ndarray]] = defaultdict(list)
    for side, pools, sources in (
        (0, [each.A for each in held], [entry.A for entry in entries]),
        (1, [each.B for each in held], [entry.B for entry in entries]),
    ):
        width = np.array([pool.shape[1] for pool in pools], np.int64)
        # B lies turned in its pages.
        row_stride, column_stride = (ones, ranks) if side else (width, ones)
        begin = np.array([pool.data_ptr() for pool in pools], np.int64)
        sizes = row_stride * np.array([source.itemsize for source in sources], np.int64)
        columns = (
            begin[:, None] + pages * (page_rows * target.itemsize * width)[:, None],
            moved.addresses[side::2, None] + before * sizes[:, None],
            counts, width[:, None], row_stride[:, None], column_stride[:, None],
        )  # fmt: skip
        rows = np.stack(np.broadcast_arrays(*columns), axis=-1)
        dtypes = [source.dtype for source in sources]
        for dtype in dict.fromkeys(dtypes):
            of_type = np.array([each is dtype for each in dtypes])
            by_type[dtype].append(rows[(counts > 0) & of_type[:, None]])
    for dtype, both in by_type.items():
        fill_rows(np.concatenate(both), dtype, target)


def rehearse_fill(pool: torch.Tensor) -> None:
    """Have what fills pages of the type of ``pool``, on its device, compiled before the first adapter comes."""
    from peft_dist.kernels.lora_fill_triton import fill_rows

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        # No row of one element: nothing is touched.
        fill_rows(np.array([[0, 0, 0, 1, 1, 1]], np.int64), dtype, pool)


def _copies(entry: Entry) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(to, from)."""
    held = entry.layer.weights
    for first, count, done in entry.layer.segments(entry.pages, len(entry.A)):
        for target, source in ((held.A, entry.A), (held.B, entry.B.T)):
            yield target[first : first + count], source[done : done + count]
