"""Triton kernels of LoRA: a shrink (x by A), and an expand (the rank intermediate by B, added to y).

Both go by ``LoRATiles`` and read adapters through the pool's device tables, so nothing on the host decides what they
read. Up to three layers that read one x are one launch. The shrink splits the inputs among ``SPLIT`` programs, each of
which stores its float32 partial sums; the expand adds them up. So there is nothing to clear and nothing atomic, and a
row gets the same bits in any place of a batch and beside any rows of other adapters, as long as the launch plan is the
same. Rows of its own adapter matter by their number alone: a few in a tile are summed in float32 one by one
(``takes_rows``), more as a product of matrices that has the intermediate as two numbers of half precision, so that an
element may be rounded otherwise.

Partials are float32 ``[tiles, GROUP, SPLIT, TILE, max_rank]``; what no row owns is neither written nor read, and
of a rank whole blocks of 16 are.

At decode every step of a chain of loads that wait for each other costs as much as all of the arithmetic, so what can be
asked for at once is: tile, slot and rows; then rank, scaling and pages; then weights and inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from peft_dist.kernels.lora_triton_parts import (
    EXPAND_RANKS,
    expand_part,
    find_adapter,
    layer_of,
    load_b,
    load_pages,
    multiply,
    pick,
)
from peft_dist.kernels.lora_triton_rows import add_rows, takes_rows


@triton.jit(
    do_not_specialize=[
        *("table0", "table1", "table2", "slots0", "slots1", "slots2", "columns0", "columns1", "columns2"),
    ]
)
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
    columns0,
    A1,
    pages1,
    ranks1,
    scalings1,
    table1,
    slots1,
    columns1,
    A2,
    pages2,
    ranks2,
    scalings2,
    table2,
    slots2,
    columns2,
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
    BY_TILE: tl.constexpr,
    RANK_PARTS: tl.constexpr,
):
    """Program (layer, part of its ranks and part of the inputs, tile).

    RANK_PARTS programs take a tile's ranks in turn, BLOCK_R each: those behind its own rank have nothing to do.
    """
    layer = tl.program_id(0) // (SPLIT * RANK_PARTS)
    split = tl.program_id(0) % SPLIT
    first = 0
    if RANK_PARTS > 1:
        first = tl.program_id(0) // SPLIT % RANK_PARTS * BLOCK_R
    tile = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.arange(0, TILE)
    length = tl.load(tile_lens + tile)
    slot = tl.load(tile_slots + tile)
    row = tl.load(tile_rows + tile * TILE + m)
    if BY_TILE:
        # Tiles that are not used and the base's have rank 0 there.
        slot = tile
    else:
        if (length == 0) | (slot < 0):
            return
    table = pick(layer, table0, table1, table2, GROUP)
    columns = pick(layer, columns0, columns1, columns2, GROUP)
    is_known = (slot >= 0) & (slot < pick(layer, slots0, slots1, slots2, GROUP))
    slot = tl.where(is_known, slot, 0)
    pages = pick(layer, pages0, pages1, pages2, GROUP) + slot * table
    rank = tl.load(pick(layer, ranks0, ranks1, ranks2, GROUP) + slot * table, mask=is_known, other=0)
    scaling = tl.load(pick(layer, scalings0, scalings1, scalings2, GROUP) + slot * table, mask=is_known, other=0.0)
    page = load_pages(pages, first + tl.arange(0, BLOCK_R), tl.where(is_known, columns, 0), PAGE)
    if rank <= first:
        return
    A = pick(layer, A0, A1, A2, GROUP)
    is_row = m < length
    x_row = x + row.to(tl.int64)[:, None] * X_STRIDE
    part: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K) * BLOCK_K
    out = partials + (((tile * GROUP + layer) * SPLIT + split).to(tl.int64) * TILE + m[:, None]) * max_rank
    stored = (rank + EXPAND_RANKS - 1) // EXPAND_RANKS * EXPAND_RANKS
    while first < rank:
        r = first + tl.arange(0, BLOCK_R)
        a_row = (page * PAGE + r % PAGE).to(tl.int64) * K
        acc = tl.zeros((TILE, BLOCK_R), tl.float32)
        for begin in range(0, part, BLOCK_K):
            k = split * part + begin + tl.arange(0, BLOCK_K)
            x_mask, a_mask = is_row[:, None], (r < rank)[None, :]
            if part * SPLIT > K:
                x_mask, a_mask = x_mask & (k < K)[None, :], a_mask & (k < K)[:, None]
            xs = tl.load(x_row + k[None, :], mask=x_mask, other=0.0)
            a = tl.load(A + a_row[None, :] + k[:, None], mask=a_mask, other=0.0)
            acc = multiply(xs, a, acc, WIDE)
        # Zeros where the rank ends, so that the expand reads whole blocks.
        tl.store(out + r[None, :], acc * (scaling * factor), mask=is_row[:, None] & (r < stored)[None, :])
        first += RANK_PARTS * BLOCK_R
        page = load_pages(pages, r + RANK_PARTS * BLOCK_R, columns, PAGE)


@triton.jit(
    do_not_specialize=[
        *("table0", "table1", "table2", "slots0", "slots1", "slots2", "columns0", "columns1", "columns2"),
    ]
)
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
    columns0,
    B1,
    pages1,
    ranks1,
    table1,
    slots1,
    columns1,
    B2,
    pages2,
    ranks2,
    table2,
    slots2,
    columns2,
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
    PART_N: tl.constexpr,
    FEW: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
    BY_TILE: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Program (layer and part of its outputs, tile). Without ADDS y gets the parts alone, zeros in the base's tiles.

    A tile of up to FEW rows takes ``BLOCK_N`` outputs a program, and the programs of the parts within have nothing to
    do: it is short of bytes on their way, where a tile of many rows is short of programs.
    """
    block = tl.program_id(0)
    tile = tl.program_id(1)
    m = tl.arange(0, TILE)
    length = tl.load(tile_lens + tile)
    slot = tl.load(tile_slots + tile)
    row = tl.load(tile_rows + tile * TILE + m).to(tl.int64)
    if not (PDL or BY_TILE):  # noqa: SIM102
        # Tiles that are not used, and those of the base.
        if (length == 0) | ((slot < 0) & ADDS):
            return
    blocks0: tl.constexpr = (N0 + PART_N - 1) // PART_N
    blocks1: tl.constexpr = (N1 + PART_N - 1) // PART_N if GROUP > 1 else 0
    layer, block = layer_of(block, blocks0, blocks1, GROUP)
    width = pick(layer, N0, N1, N2, GROUP)
    is_within = block % (BLOCK_N // PART_N) != 0
    if not (PDL or BY_TILE):  # noqa: SIM102
        # That of others shows when their rank is known.
        if (length == 1) & is_within:
            return
    B = pick(layer, B0, B1, B2, GROUP)
    columns = pick(layer, columns0, columns1, columns2, GROUP)
    pages, rank, page = find_adapter(
        pick(layer, pages0, pages1, pages2, GROUP),
        pick(layer, ranks0, ranks1, ranks2, GROUP),
        pick(layer, table0, table1, table2, GROUP),
        pick(layer, slots0, slots1, slots2, GROUP),
        columns,
        tile if BY_TILE else slot,
        1 if BY_TILE else length,
        PAGE,
    )
    r = tl.arange(0, EXPAND_RANKS)
    n = block * PART_N + tl.arange(0, BLOCK_N)
    is_few = takes_rows(length, rank, FEW)
    is_idle = (rank == 0 if ADDS else length == 0) | (is_few & is_within)
    b = load_b(B, page, r, rank, n, tl.where(is_few & (not is_idle), width, 0), PAGE)
    if PDL:
        # What is above may run beside the shrink, what is below reads what the shrink and others wrote. No program ends
        # without it: what is queued behind this kernel relies on all that came before.
        gdc_launch_dependents()
        gdc_wait()
    if is_idle:
        return
    y_stride = pick(layer, Y_STRIDE0, Y_STRIDE1, Y_STRIDE2, GROUP)
    y = pick(layer, y0, y1, y2, GROUP)
    source = partials + (tile * GROUP + layer).to(tl.int64) * SPLIT * TILE * max_rank
    if is_few:
        add_rows(
            y, y_stride, tile_rows + tile * TILE, length, source, B, b, pages, columns, rank, n, width, max_rank,
            PAGE, TILE, SPLIT, ADDS,
        )  # fmt: skip
        return
    part = block * PART_N + tl.arange(0, PART_N)
    is_row = m < length
    here = y + row[:, None] * y_stride + part[None, :]
    y_mask = is_row[:, None] & (part < width)[None, :]
    b_part = load_b(B, page, r, rank, part, width, PAGE)
    before = tl.load(here, mask=y_mask & ADDS, other=0.0)
    acc = expand_part(
        source + m[:, None] * max_rank,
        B, b_part, pages, columns, rank, is_row, part, width, max_rank, PAGE, TILE, SPLIT, PART_N, WIDE,
    )  # fmt: skip
    tl.store(here, (before.to(tl.float32) + acc).to(before.dtype), mask=y_mask)
