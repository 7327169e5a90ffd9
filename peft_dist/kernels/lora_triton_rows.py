"""Tiles of a few rows, as in steps with many adapters: expanded row by row, without products of rows that are not."""

from __future__ import annotations

import triton
import triton.language as tl

from peft_dist.kernels.lora_triton_parts import EXPAND_RANKS, load_b, load_pages


@triton.jit
def takes_rows(length, rank, FEW: tl.constexpr):
    """Whether a tile is expanded row by row. Of a rank that is not in work at once B would be read for each row."""
    return (length == 1) | ((length <= FEW) & (rank <= EXPAND_RANKS))


@triton.jit
def ask_row(
    y, y_stride, rows, i, length, source, rank, n, width, max_rank, TILE: tl.constexpr, SPLIT: tl.constexpr,
    ADDS: tl.constexpr = True,
):  # fmt: skip
    """Number, columns ``n`` and intermediate of row ``i`` of a tile, which reads nothing where it has no such row.

    ``rows``: where the tile's numbers are; ``source``: its first partials. The columns are 0 without ADDS.
    """
    is_there = i < length
    row = tl.load(rows + i, mask=is_there, other=0).to(tl.int64)
    before = tl.load(y + row * y_stride + n, mask=(n < width) & is_there & ADDS, other=0.0)
    return row, before, row_sums(source + i * max_rank, is_there & (rank > 0), max_rank, 0, TILE, SPLIT)


@triton.jit
def row_sums(source, is_there, max_rank, first, TILE: tl.constexpr, SPLIT: tl.constexpr):
    """A row's intermediate from rank ``first`` on, float32 ``[EXPAND_RANKS]``; ``source``: its first partials.

    The threads share the parts out: if each read all of them, that would be more than B.
    """
    r = first + tl.arange(0, EXPAND_RANKS)
    split = tl.arange(0, triton.next_power_of_2(SPLIT))
    parts = source + split[:, None] * (TILE * max_rank) + r[None, :]
    return tl.sum(tl.load(parts, mask=((split < SPLIT) & is_there)[:, None], other=0.0), axis=0)


@triton.jit
def row_part(
    h, b, source, B, pages, columns, rank, n, width, max_rank,
    PAGE: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A row's part of columns ``n``, float32 ``[len(n)]``; ``h``, ``b``: its intermediate and B from rank 0 on."""
    acc = tl.sum(h[:, None] * b.to(tl.float32), axis=0)
    first = 0 + EXPAND_RANKS
    while first < rank:
        r = first + tl.arange(0, EXPAND_RANKS)
        more = load_b(B, load_pages(pages, r, columns, PAGE), r, rank, n, width, PAGE)
        h = row_sums(source, first < rank, max_rank, first, TILE, SPLIT)
        acc += tl.sum(h[:, None] * more.to(tl.float32), axis=0)
        first += EXPAND_RANKS
    return acc


@triton.jit
def add_rows(
    y, y_stride, rows, length, source, B, b, pages, columns, rank, n, width, max_rank,
    PAGE: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """Add columns ``n`` of their parts to a tile's rows, or without ADDS put them there; ``b``, which ``load_b`` gave,
    stays for all of them."""
    row, before, h = ask_row(y, y_stride, rows, 0, length, source, rank, n, width, max_rank, TILE, SPLIT, ADDS)
    i = 0
    while i < length:
        # What the next row needs is asked for before this one's is waited for.
        next_row, next_before, next_h = ask_row(
            y, y_stride, rows, i + 1, length, source, rank, n, width, max_rank, TILE, SPLIT, ADDS
        )
        acc = row_part(
            h, b, source + i * max_rank, B, pages, columns, rank, n, width, max_rank, PAGE, TILE, SPLIT
        )  # fmt: skip
        tl.store(y + row * y_stride + n, (before.to(tl.float32) + acc).to(before.dtype), mask=n < width)
        row, before, h = next_row, next_before, next_h
        i += 1
