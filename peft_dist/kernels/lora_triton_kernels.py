"""Triton kernels of LoRA: a shrink (x by A), and an expand (the rank intermediate by B, added to y).

Both go by ``LoRATiles`` and read adapters through the pool's device tables, so nothing on the host decides what they
read. Up to three layers that read one x are one launch. The shrink splits the inputs among ``SPLIT`` programs, each of
which stores its float32 partial sums; the expand adds them up. So there is nothing to clear and nothing atomic, and a
row gets the same bits whatever other rows are in its batch, as long as the launch plan is the same.

Partials are float32 ``[tiles, GROUP, SPLIT, TILE, max_rank]``; what no row owns is neither written nor read, and
of a rank only whole blocks are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _pick(index, first, second, third, GROUP: tl.constexpr):
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
def _rank_of(slot, ranks, stride, num_slots):
    """0 for the base and for slots that the layer's tables do not have."""
    return tl.load(ranks + slot * stride, mask=(slot >= 0) & (slot < num_slots), other=0)


@triton.jit
def _pool_rows(pages, r, has_rank, PAGE: tl.constexpr):
    """Rows of A and B at which the ranks ``r`` of a slot lie; int64."""
    page = tl.load(pages + r // PAGE, mask=has_rank, other=0)
    return (page * PAGE + r % PAGE).to(tl.int64)


@triton.jit
def _multiply(a, b, acc, WIDE: tl.constexpr):
    """``acc + a @ b``, exact products; WIDE: one of them is float32, or they differ."""
    if WIDE:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def _multiply_intermediate(h, b, acc, WIDE: tl.constexpr):
    """``acc + h @ b`` for float32 h. In half precision two products, of h and of what its rounding left."""
    if WIDE:
        acc = tl.dot(h, b.to(tl.float32), acc, input_precision="ieee")
    else:
        high = h.to(b.dtype)
        acc = tl.dot(high, b, acc)
        acc = tl.dot((h - high.to(tl.float32)).to(b.dtype), b, acc)
    return acc


@triton.jit(do_not_specialize=["table0", "table1", "table2", "slots0", "slots1", "slots2"])
def shrink_kernel(
    x,
    partials,
    tile_rows,
    tile_slots,
    tile_lens,
    A0,
    pages0,
    ranks0,
    scalings0,
    table0,
    slots0,
    A1,
    pages1,
    ranks1,
    scalings1,
    table1,
    slots1,
    A2,
    pages2,
    ranks2,
    scalings2,
    table2,
    slots2,
    factor,
    max_rank,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (layer and part of the inputs, tile)."""
    layer = tl.program_id(0) // SPLIT
    split = tl.program_id(0) % SPLIT
    tile = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(tile_lens + tile)
    if length == 0:
        return
    table = _pick(layer, table0, table1, table2, GROUP)
    slot = tl.load(tile_slots + tile)
    ranks = _pick(layer, ranks0, ranks1, ranks2, GROUP)
    rank = _rank_of(slot, ranks, table, _pick(layer, slots0, slots1, slots2, GROUP))
    if rank == 0:
        return
    scaling = tl.load(_pick(layer, scalings0, scalings1, scalings2, GROUP) + slot * table) * factor
    pages = _pick(layer, pages0, pages1, pages2, GROUP) + slot * table
    A = _pick(layer, A0, A1, A2, GROUP)
    m = tl.arange(0, TILE)
    is_row = m < length
    row = tl.load(tile_rows + tile * TILE + m, mask=is_row, other=0).to(tl.int64)
    part: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K) * BLOCK_K
    out = partials + (((tile * GROUP + layer) * SPLIT + split).to(tl.int64) * TILE + m[:, None]) * max_rank
    first = 0
    while first < rank:
        r = first + tl.arange(0, BLOCK_R)
        has_rank = r < rank
        a_row = _pool_rows(pages, r, has_rank, PAGE) * K
        acc = tl.zeros((TILE, BLOCK_R), tl.float32)
        for begin in range(0, part, BLOCK_K):
            k = split * part + begin + tl.arange(0, BLOCK_K)
            x_mask, a_mask = is_row[:, None], has_rank[None, :]
            if part * SPLIT > K:
                x_mask, a_mask = x_mask & (k < K)[None, :], a_mask & (k < K)[:, None]
            xs = tl.load(x + row[:, None] * X_STRIDE + k[None, :], mask=x_mask, other=0.0)
            a = tl.load(A + a_row[None, :] + k[:, None], mask=a_mask, other=0.0)
            acc = _multiply(xs, a, acc, WIDE)
        # Zeros where the rank ends, so that the expand reads whole blocks.
        tl.store(out + r[None, :], acc * scaling, mask=is_row[:, None])
        first += BLOCK_R


@triton.jit(do_not_specialize=["table0", "table1", "table2", "slots0", "slots1", "slots2"])
def expand_kernel(
    y0,
    y1,
    y2,
    partials,
    tile_rows,
    tile_slots,
    tile_lens,
    B0,
    pages0,
    ranks0,
    table0,
    slots0,
    B1,
    pages1,
    ranks1,
    table1,
    slots1,
    B2,
    pages2,
    ranks2,
    table2,
    slots2,
    max_rank,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    Y_STRIDE0: tl.constexpr,
    Y_STRIDE1: tl.constexpr,
    Y_STRIDE2: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (layer and block of its outputs, tile)."""
    block = tl.program_id(0)
    tile = tl.program_id(1)
    blocks0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    blocks1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N if GROUP > 1 else 0
    layer = 0
    if GROUP > 1:
        layer = (block >= blocks0).to(tl.int32)
    if GROUP > 2:
        layer += (block >= blocks0 + blocks1).to(tl.int32)
    length = tl.load(tile_lens + tile)
    if PDL:
        gdc_launch_dependents()
    if length == 0:
        if PDL:
            gdc_wait()
        return
    table = _pick(layer, table0, table1, table2, GROUP)
    slot = tl.load(tile_slots + tile)
    rank = _rank_of(
        slot, _pick(layer, ranks0, ranks1, ranks2, GROUP), table, _pick(layer, slots0, slots1, slots2, GROUP)
    )
    if rank == 0:
        if PDL:
            gdc_wait()
        return
    pages = _pick(layer, pages0, pages1, pages2, GROUP) + slot * table
    B = _pick(layer, B0, B1, B2, GROUP)
    y = _pick(layer, y0, y1, y2, GROUP)
    width = _pick(layer, N0, N1, N2, GROUP)
    y_stride = _pick(layer, Y_STRIDE0, Y_STRIDE1, Y_STRIDE2, GROUP)
    n = (block - _pick(layer, 0, blocks0, blocks0 + blocks1, GROUP)) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_column = n < width
    m = tl.arange(0, TILE)
    is_row = m < length
    row = tl.load(tile_rows + tile * TILE + m, mask=is_row, other=0).to(tl.int64)
    if PDL:
        gdc_wait()
    here = y + row[:, None] * y_stride + n[None, :]
    y_mask = is_row[:, None] & has_column[None, :]
    before = tl.load(here, mask=y_mask, other=0.0)
    source = partials + ((tile * GROUP + layer).to(tl.int64) * SPLIT * TILE + m[:, None]) * max_rank
    acc = tl.zeros((TILE, BLOCK_N), tl.float32)
    first = 0
    while first < rank:
        r = first + tl.arange(0, BLOCK_R)
        has_rank = r < rank
        b_row = _pool_rows(pages, r, has_rank, PAGE) * width
        b = tl.load(B + b_row[:, None] + n[None, :], mask=has_rank[:, None] & has_column[None, :], other=0.0)
        h = tl.zeros((TILE, BLOCK_R), tl.float32)
        for split in tl.static_range(SPLIT):
            h += tl.load(source + split * TILE * max_rank + r[None, :], mask=is_row[:, None], other=0.0)
        acc = _multiply_intermediate(h, b, acc, WIDE)
        first += BLOCK_R
    tl.store(here, (before.to(tl.float32) + acc).to(before.dtype), mask=y_mask)
