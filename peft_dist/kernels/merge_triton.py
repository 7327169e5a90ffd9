"""Merging on a GPU: one launch for all weights of one shape, rank and layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from peft_dist.kernels.transfer import to_device
from peft_dist.kernels.triton_device import triton_type

if TYPE_CHECKING:
    from peft_dist.kernels.merge import MergeItem

_BLOCK_ROWS, _BLOCK_COLUMNS = 32, 128


@triton.jit
def _merge_kernel(
    addresses,
    scalings,
    num_rows,
    num_columns,
    rank,
    out_stride,
    base_stride,
    a_stride_rank,
    a_stride_column,
    b_stride_row,
    b_stride_rank,
    W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    """Program (tile, layer). ``addresses`` is int64 ``[layers, 4]``: out, base (of type W), A, B (float32)."""
    layer = tl.program_id(1)
    out = tl.load(addresses + 4 * layer).to(tl.pointer_type(W))
    base = tl.load(addresses + 4 * layer + 1).to(tl.pointer_type(W))
    a = tl.load(addresses + 4 * layer + 2).to(tl.pointer_type(tl.float32))
    b = tl.load(addresses + 4 * layer + 3).to(tl.pointer_type(tl.float32))
    column_blocks = tl.cdiv(num_columns, BLOCK_COLUMNS)
    # 64 bits: a large vocabulary times a wide model passes 2 ** 31 elements.
    rows = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    has_row = rows < num_rows
    has_column = columns < num_columns
    delta = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for first in range(0, rank, BLOCK_RANK):
        ranks = first + tl.arange(0, BLOCK_RANK)
        has_rank = ranks < rank
        b_tile = tl.load(
            b + rows[:, None] * b_stride_row + ranks[None, :] * b_stride_rank,
            mask=has_row[:, None] & has_rank[None, :],
            other=0.0,
        )
        a_tile = tl.load(
            a + ranks[:, None] * a_stride_rank + columns[None, :] * a_stride_column,
            mask=has_rank[:, None] & has_column[None, :],
            other=0.0,
        )
        # Full float32: TF32 would round A and B to 10 bits.
        delta += tl.dot(b_tile, a_tile, input_precision="ieee")
    inside = has_row[:, None] & has_column[None, :]
    value = tl.load(base + rows[:, None] * base_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    value += tl.load(scalings + layer) * delta
    tl.store(out + rows[:, None] * out_stride + columns[None, :], value.to(W), mask=inside)


def merge_group_(items: Sequence[MergeItem]) -> None:
    """Triton back end of ``merge.merge_group_``; the items fit, their weights lie on one GPU in unit column strides."""
    groups: dict[Any, list[MergeItem]] = {}
    for item in items:
        A, B = (t.to(item.out.device, torch.float32, non_blocking=True) for t in (item.A, item.B))
        key = (item.out.shape, item.out.dtype, len(A), item.out.stride(), item.base.stride(), A.stride(), B.stride())
        groups.setdefault(key, []).append(item._replace(A=A, B=B))
    for group in groups.values():
        _launch(group)


def _launch(group: list[MergeItem]) -> None:
    first = group[0]
    out, base, A, B = first.out, first.base, first.A, first.B
    rows, columns = out.shape
    addresses = [[t.data_ptr() for t in (item.out, item.base, item.A, item.B)] for item in group]
    grid = (triton.cdiv(rows, _BLOCK_ROWS) * triton.cdiv(columns, _BLOCK_COLUMNS), len(group))
    with torch.cuda.device(out.device):
        _merge_kernel[grid](
            to_device(torch.tensor(addresses, dtype=torch.int64), out.device),
            to_device(torch.tensor([item.scaling for item in group], dtype=torch.float32), out.device),
            rows,
            columns,
            len(A),
            out.stride(0),
            base.stride(0),
            *A.stride(),
            *B.stride(),
            W=triton_type(out.dtype),
            BLOCK_ROWS=_BLOCK_ROWS,
            BLOCK_COLUMNS=_BLOCK_COLUMNS,
            BLOCK_RANK=16,
        )
