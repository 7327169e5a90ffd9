"""An adapter's matrices into the pages of all layers, by one launch for each of their types."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from peft_dist.kernels.transfer import to_device
from peft_dist.kernels.triton_device import device_of, triton_type

_BLOCK_ROWS = 8
_BLOCK_COLUMNS = 1024
_FIELDS = tl.constexpr(6)


@triton.jit
def fill_kernel(table, S: tl.constexpr, T: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Program (entry, block of columns). ``table`` is int64 ``[entries, 6]``, see ``fill_rows``."""
    entry = table + tl.program_id(0) * _FIELDS
    width = tl.load(entry + 3)
    first_column = tl.program_id(1) * BLOCK_COLUMNS
    if first_column >= width:
        return
    column = first_column + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    target = tl.load(entry).to(tl.pointer_type(T))
    source = tl.load(entry + 1).to(tl.pointer_type(S))
    count = tl.load(entry + 2)
    row_stride = tl.load(entry + 4)
    column_stride = tl.load(entry + 5)
    first = tl.zeros((), tl.int64)
    while first < count:
        row = first + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = (row < count)[:, None] & (column < width)[None, :]
        values = tl.load(source + row[:, None] * row_stride + column[None, :] * column_stride, mask=inside)
        tl.store(target + row[:, None] * width + column[None, :], values.to(T), mask=inside)
        first += BLOCK_ROWS


def fill_rows(rows: np.ndarray, source: torch.dtype, target: torch.Tensor) -> None:
    """Copy, and round, rows of one type into others of the type of ``target``, on its device and current stream.

    Nobody may free the sources before that has run; on a CPU (Triton's interpreter) it has when this returns.
    Copy by copy an adapter of an 8B Llama is 448 launches: beside steps that fill the device each waits for its turn,
    0.06 s in all.

    Args:
        rows: int64 ``[entries, 6]``: some rows that lie side by side, and what belongs there: address of the first row,
            address of the first element for it, number of rows, elements of a row, elements of the source from a row
            to the next, and within a row.
    """
    if not len(rows):
        return
    table = to_device(torch.from_numpy(rows), target.device)
    blocks = triton.cdiv(int(rows[:, 3].max()), _BLOCK_COLUMNS)
    with device_of(target):
        fill_kernel[(len(rows), blocks)](
            table,
            S=triton_type(source),
            T=triton_type(target.dtype),
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_COLUMNS=_BLOCK_COLUMNS,
        )
