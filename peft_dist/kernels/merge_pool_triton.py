"""Merging a resident adapter: the kernel reads A and B in the pool, through the tables of the LoRA kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from peft_dist.kernels.pooled_adapter import PooledItem
from peft_dist.kernels.transfer import to_device
from peft_dist.kernels.triton_device import device_of, triton_type

_FIELDS = tl.constexpr(9)


@triton.jit
def _address(entry, index: tl.constexpr, kind: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(entry + index).to(tl.pointer_type(kind))
    if ALIGNED:
        # Of an address that was read nothing is known: elements would move one by one.
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["slot"])
def merge_pool_kernel(
    table,
    slot,
    num_rows,
    num_columns,
    out_stride,
    base_stride,
    W: tl.constexpr,
    P: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Program (tile, layer). ``table`` is int64 ``[layers, 9]``, see ``_entry``.

    ``left`` (type P) is ``[pool rows, num_rows]`` and ``right`` ``[pool rows, num_columns]``: B and A of a weight that
    is stored ``[out, in]``, A and B of one that is stored ``[in, out]``.
    """
    entry = table + tl.program_id(1) * _FIELDS
    out = _address(entry, 0, W, ALIGNED)
    base = _address(entry, 1, W, ALIGNED)
    left = _address(entry, 2, P, ALIGNED)
    right = _address(entry, 3, P, ALIGNED)
    pages = _address(entry, 4, tl.int32, False)
    ranks = _address(entry, 5, tl.int32, False)
    scalings = _address(entry, 6, tl.float32, False)
    row_of_slot = slot * tl.load(entry + 7)
    is_known = slot < tl.load(entry + 8)
    column_blocks = tl.cdiv(num_columns, BLOCK_COLUMNS)
    first_row = (tl.program_id(0) // column_blocks) * BLOCK_ROWS
    first_column = (tl.program_id(0) % column_blocks) * BLOCK_COLUMNS
    m, n = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    has_row, has_column = m < num_rows - first_row, n < num_columns - first_column
    inside = has_row[:, None] & has_column[None, :]
    # 64 bits: a large vocabulary times a wide model passes 2 ** 31 elements; a tile does not.
    base += first_row.to(tl.int64) * base_stride + first_column
    out += first_row.to(tl.int64) * out_stride + first_column
    # Asked for first: all else is a chain of loads that takes as long.
    value = tl.load(base + m[:, None] * base_stride + n[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
    rank = tl.load(ranks + row_of_slot, mask=is_known, other=0)
    scaling = tl.load(scalings + row_of_slot, mask=is_known, other=0.0)
    if rank == 0:
        # The base's bits: a sum with zero would turn -0.0 around.
        tl.store(out + m[:, None] * out_stride + n[None, :], value, mask=inside, eviction_policy="evict_first")
        return
    delta = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    first = 0
    while first < rank:
        r = first + tl.arange(0, BLOCK_RANK)
        has_rank = r < rank
        row = tl.load(pages + row_of_slot + r // PAGE, mask=has_rank, other=0).to(tl.int64) * PAGE + r % PAGE
        left_tile = tl.load(
            left + first_row + row[:, None] * num_rows + m[None, :],
            mask=has_rank[:, None] & has_row[None, :],
            other=0.0,
        )
        right_tile = tl.load(
            right + first_column + row[:, None] * num_columns + n[None, :],
            mask=has_rank[:, None] & has_column[None, :],
            other=0.0,
        )
        # Products of half-precision factors are exact. Full float32 else: TF32 would round A and B to 10 bits.
        delta = tl.dot(tl.trans(left_tile), right_tile, delta, input_precision="ieee")
        first += BLOCK_RANK
    merged = (value.to(tl.float32) + scaling * delta).to(W)
    tl.store(out + m[:, None] * out_stride + n[None, :], merged, mask=inside, eviction_policy="evict_first")


class Tile(NamedTuple):
    """What a program writes, of how many ranks at a time, and with how many warps and registers of each thread."""

    rows: int
    columns: int
    ranks: int
    warps: int
    registers: int


class _Kind(NamedTuple):
    """What weights of one launch have in common."""

    rows: int
    columns: int
    weight: torch.dtype
    adapter: torch.dtype
    page_rows: int
    out_stride: int
    base_stride: int
    aligned: bool


class _Launch(NamedTuple):
    kind: _Kind
    count: int
    table: torch.Tensor


class MergeTable:
    """Weights that any slot of a pool can be merged into, in one launch for those of one shape and dtype.

    It holds addresses, so it is good for as long as the weights and the pool's buffers and tables stay where they are.
    """

    def __init__(self, items: Sequence[PooledItem]) -> None:
        """The items must be on one device, and none have a ``reason_against``."""
        kinds: dict[_Kind, list[list[int]]] = {}
        for item in items:
            entry = _entry(item)
            kinds.setdefault(_kind_of(item, entry), []).append(entry)
        self._launches = [
            _Launch(kind, len(entries), to_device(torch.tensor(entries, dtype=torch.int64), items[0].out.device))
            for kind, entries in kinds.items()
        ]

    @property
    def num_launches(self) -> int:
        return len(self._launches)

    def merge(self, slot: int, max_rank: int) -> None:
        """Write every weight, on the current stream: merged where the slot adapts its layer, else the base's.

        Args:
            max_rank: The slot's highest rank; a smaller number than that costs time, no more.
        """
        for kind, count, table in self._launches:
            tile = tile_of(kind.weight, kind.adapter, max_rank)
            tiles = triton.cdiv(kind.rows, tile.rows) * triton.cdiv(kind.columns, tile.columns)
            with device_of(table):
                merge_pool_kernel[(tiles, count)](
                    table,
                    slot,
                    kind.rows,
                    kind.columns,
                    kind.out_stride,
                    kind.base_stride,
                    W=triton_type(kind.weight),
                    P=triton_type(kind.adapter),
                    PAGE=kind.page_rows,
                    BLOCK_ROWS=tile.rows,
                    BLOCK_COLUMNS=tile.columns,
                    BLOCK_RANK=tile.ranks,
                    ALIGNED=kind.aligned,
                    num_warps=tile.warps,
                    maxnreg=tile.registers,
                )


def tile_of(weight: torch.dtype, adapter: torch.dtype, max_rank: int) -> Tile:
    """Small enough for two programs or more on a multiprocessor, so that one reads while another multiplies and writes;
    larger where a tile's part of A and B would be more than it reads of the base."""
    if torch.float32 in (weight, adapter):
        return Tile(64, 128, 16, 8, 128)
    return Tile(64, 128, 16, 4, 128) if max_rank <= 16 else Tile(128, 128, 32, 8, 128)


def _entry(item: PooledItem) -> list[int]:
    """out, base, left, right, the slots' pages, ranks and scalings; distance of two slots in these, their number."""
    held = item.weights
    assert held.pages_t is not None and held.rank_t is not None and held.scaling_t is not None
    factors = (held.A, held.B) if item.turned else (held.B, held.A)
    tensors = (item.out, item.base, *factors, held.pages_t, held.rank_t, held.scaling_t)
    return [*(tensor.data_ptr() for tensor in tensors), held.rank_t.stride(0), len(held.rank_t)]


def _kind_of(item: PooledItem, entry: list[int]) -> _Kind:
    out, base, held = item.out, item.base, item.weights
    rows, columns = out.shape
    aligned = not any(address % 16 for address in entry[:4])
    strides: tuple[Any, Any] = out.stride(0), base.stride(0)
    return _Kind(rows, columns, out.dtype, held.A.dtype, held.page_rows, *strides, aligned)
