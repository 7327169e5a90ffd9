"""What the LoRA kernels are made of: loads through the pool's tables, products, one layer's part of an output."""

from __future__ import annotations

import triton
import triton.language as tl

EXPAND_RANKS = tl.constexpr(16)
"""Ranks that an expand has in work at once."""


@triton.jit
def pick(index, first, second, third, GROUP: tl.constexpr):
    """Argument of the layer with this index."""
    chosen = first
    # Nested, because only the outer conditions are known when it is compiled.
    if GROUP > 1:  # noqa: SIM102
        if index == 1:
            chosen = second
    if GROUP > 2:  # noqa: SIM102
        if index == 2:
            chosen = third
    return chosen


@triton.jit
def layer_of(block, blocks0: tl.constexpr, blocks1: tl.constexpr, GROUP: tl.constexpr):
    """Which layer's a block is, where those of a group come one after another, and which of its blocks."""
    layer = 0
    if GROUP > 1:
        layer = (block >= blocks0).to(tl.int32)
    if GROUP > 2:
        layer += (block >= blocks0 + blocks1).to(tl.int32)
    return layer, block - pick(layer, 0, blocks0, blocks0 + blocks1, GROUP)


@triton.jit
def load_pages(pages, r, columns, PAGE: tl.constexpr):
    """Pages of the ranks ``r``, as far as the table reaches: asked for before the rank is known."""
    return tl.load(pages + r // PAGE, mask=r // PAGE < columns, other=0)


@triton.jit
def multiply(a, b, acc, WIDE: tl.constexpr):
    """``acc + a @ b``, exact products; WIDE: one of them is float32, or they differ."""
    if WIDE:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def multiply_intermediate(h, b, acc, WIDE: tl.constexpr):
    """``acc + h @ b`` for float32 h. In half precision two products, of h and of what its rounding left."""
    if WIDE:
        acc = tl.dot(h, b.to(tl.float32), acc, input_precision="ieee")
    else:
        high = h.to(b.dtype)
        acc = tl.dot(high, b, acc)
        acc = tl.dot((h - high.to(tl.float32)).to(b.dtype), b, acc)
    return acc


@triton.jit
def load_b(B, page, r, rank, n, width, PAGE: tl.constexpr):
    """``[len(r), len(n)]`` of a slot's B; zeros behind its rank and behind the last column."""
    row = (page * PAGE + r % PAGE).to(tl.int64) * width
    return tl.load(B + row[:, None] + n[None, :], mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0)


@triton.jit
def find_adapter(pages, ranks, table, slots, columns, slot, length, PAGE: tl.constexpr):
    """Pages, rank and first pages of a tile's slot in one layer; rank 0 where there is nothing to add.

    In tables by tile (``lora_lookup_triton``) the slot is the tile, whatever its length: nothing is waited for then.
    """
    is_known = (length > 0) & (slot >= 0) & (slot < slots)
    slot = tl.where(is_known, slot, 0)
    pages = pages + slot * table
    rank = tl.load(ranks + slot * table, mask=is_known, other=0)
    page = load_pages(pages, tl.arange(0, EXPAND_RANKS), tl.where(is_known, columns, 0), PAGE)
    return pages, rank, page


@triton.jit
def expand_part(
    source,
    B,
    b,
    pages,
    columns,
    rank,
    is_row,
    n,
    width,
    max_rank,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One layer's part of columns ``n``, float32 ``[TILE, BLOCK_N]``.

    ``source``: ``[TILE, 1]``, the rows' first partials; ``b``: what ``load_b`` gave for the first block of ranks.
    """
    acc = tl.zeros((TILE, BLOCK_N), tl.float32)
    first = 0
    while first < rank:
        r = first + tl.arange(0, EXPAND_RANKS)
        h = tl.zeros((TILE, EXPAND_RANKS), tl.float32)
        for split in tl.static_range(SPLIT):
            h += tl.load(source + split * TILE * max_rank + r[None, :], mask=is_row[:, None], other=0.0)
        acc = multiply_intermediate(h, b, acc, WIDE)
        first += EXPAND_RANKS
        r += EXPAND_RANKS
        b = load_b(B, load_pages(pages, r, columns, PAGE), r, rank, n, width, PAGE)
    return acc


@triton.jit
def gated(x, factor, SILU: tl.constexpr):
    """``activation(x) * factor``."""
    if SILU:
        active = x * tl.sigmoid(x)
    else:
        # x / 2 * (1 + tanh(u)) with tanh(u) = 2 * sigmoid(2 * u) - 1 and u = sqrt(2 / pi) * (x + 0.044715 * x ** 3)
        active = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return active * factor
