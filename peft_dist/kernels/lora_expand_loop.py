"""Expands whose programs go through several blocks of outputs, with the next blocks on their way meanwhile.

The kernels of ``lora_triton_kernels`` and ``lora_gate_triton`` load a block of B, wait, compute and end: with many
tiles the waits add up, wave after wave. Here as many programs run as a card has at once, and loads are pipelined. The
intermediates are added up once a program, and not once a block. The same sums: y and its part in float32, rounded once.

A captured launch has a tile for every adapter that may come. Where few are used, twice as many programs share each: the
first tiles are the used ones, so one of them tells. The programs that are only needed then come last in the launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_dist.kernels.lora_triton_parts import (
    EXPAND_RANKS,
    expand_part,
    find_adapter,
    layer_of,
    load_b,
    load_pages,
    pick,
)

FEW_STAGES = tl.constexpr(6)
"""Blocks of a tile of up to EXPAND_RANKS ranks under way, where those of more ranks leave room for fewer programs."""


@triton.jit
def own_outputs(tile_lens, watched, part, parts, BLOCK_N: tl.constexpr):
    """(first output, outputs) of the program ``part`` of ``parts`` of a tile: BLOCK_N, or half of it where the tile
    ``watched`` is not used; none where another program has them."""
    is_full = tl.load(tile_lens + watched) > 0
    share = tl.where(is_full, BLOCK_N, BLOCK_N // 2)
    return part * share, tl.where(is_full & (2 * part >= parts), 0, share)


@triton.jit
def shared_outputs(begin, count, rank, width, RANKS: tl.constexpr, SHARES: tl.constexpr):
    """``own_outputs``, but of a tile of few ranks those of up to SHARES programs for one of them, none for the others:
    its work then is no less than that of a program of RANKS ranks, as far as it goes."""
    if SHARES > 1:
        times = tl.where(rank * 2 <= RANKS, 2, 1)
        if SHARES > 2:
            times = tl.where(rank * 4 <= RANKS, 4, times)
        begin *= times
        count = tl.where(begin < width, count * times, 0)
    return begin, count


@triton.jit
def halves_of(
    source, rank, is_row, max_rank, TILE: tl.constexpr, SPLIT: tl.constexpr, dtype: tl.constexpr, RANKS: tl.constexpr
):
    """A tile's intermediates of the first ranks, ``[TILE, RANKS]``, and what their rounding to dtype left."""
    r = tl.arange(0, RANKS)
    h = tl.zeros((TILE, RANKS), tl.float32)
    mask = is_row[:, None] & (r < rank)[None, :]
    for split in tl.static_range(SPLIT):
        h += tl.load(source + split * TILE * max_rank + r[None, :], mask=mask, other=0.0)
    high = h.to(dtype)
    return high, (h - high.to(tl.float32)).to(dtype)


@triton.jit
def expand_ranks(
    y, source, B, page, rank, is_row, begin, end, width, max_rank,
    PAGE: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, PART_N: tl.constexpr, STAGES: tl.constexpr,
    ADDS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Columns ``begin`` to ``end`` of rows y ``[TILE, 1]``, of an adapter of up to RANKS ranks; ``page``: theirs."""
    r = tl.arange(0, RANKS)
    high, low = halves_of(source, rank, is_row, max_rank, TILE, SPLIT, B.dtype.element_ty, RANKS)
    b_row = B + ((page * PAGE + r % PAGE).to(tl.int64) * width)[:, None]
    for first in tl.range(begin, end, PART_N, num_stages=STAGES):
        n = first + tl.arange(0, PART_N)
        b = tl.load(b_row + n[None, :], mask=(r < rank)[:, None] & (n < width)[None, :], other=0.0)
        mask = is_row[:, None] & (n < end)[None, :]
        # As what the product starts from, so that it is among the loads that are made ahead.
        acc = tl.load(y + n[None, :], mask=mask & ADDS, other=0.0).to(tl.float32)
        acc = tl.dot(low, b, tl.dot(high, b, acc))
        tl.store(y + n[None, :], acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def expand_blocks(
    y, source, B, pages, columns, rank, is_row, begin, end, width, max_rank,
    PAGE: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, PART_N: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """The same of any rank, one block after another: each adds the intermediates up again."""
    r = tl.arange(0, EXPAND_RANKS)
    for first in range(begin, end, PART_N):
        n = first + tl.arange(0, PART_N)
        mask = is_row[:, None] & (n < end)[None, :]
        b_part = load_b(B, load_pages(pages, r, columns, PAGE), r, rank, n, width, PAGE)
        before = tl.load(y + n[None, :], mask=mask & ADDS, other=0.0)
        acc = expand_part(
            source, B, b_part, pages, columns, rank, is_row, n, width, max_rank, PAGE, TILE, SPLIT, PART_N, False,
        )  # fmt: skip
        tl.store(y + n[None, :], (before.to(tl.float32) + acc).to(before.dtype), mask=mask)


@triton.jit(
    do_not_specialize=[
        *("table0", "table1", "table2", "slots0", "slots1", "slots2", "columns0", "columns1", "columns2", "watched"),
    ]
)
def expand_loop_kernel(
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
    watched,
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
    STAGES: tl.constexpr,
    BY_TILE: tl.constexpr,
    ADDS: tl.constexpr,
    RANKS: tl.constexpr,
    SHARES: tl.constexpr,
):
    """Program (tile, part of a layer's outputs), PART_N outputs at a time. For half precision. Without ADDS y gets the
    parts alone, zeros in the base's tiles. RANKS: the most that are in work at once."""
    tile = tl.program_id(0)
    part = tl.program_id(1)
    m = tl.arange(0, TILE)
    length = tl.load(tile_lens + tile)
    slot = tl.load(tile_slots + tile)
    row = tl.load(tile_rows + tile * TILE + m).to(tl.int64)
    # Parts of all layers at their full length, then as many again: each layer's come one after another in both halves.
    parts0: tl.constexpr = (N0 + BLOCK_N - 1) // BLOCK_N
    parts1: tl.constexpr = (N1 + BLOCK_N - 1) // BLOCK_N if GROUP > 1 else 0
    parts2: tl.constexpr = (N2 + BLOCK_N - 1) // BLOCK_N if GROUP > 2 else 0
    total: tl.constexpr = parts0 + parts1 + parts2
    is_second = part >= total
    part -= tl.where(is_second, total, 0)
    layer, part = layer_of(part, parts0, parts1, GROUP)
    parts = pick(layer, parts0, parts1, parts2, GROUP)
    begin, count = own_outputs(tile_lens, watched, part + tl.where(is_second, parts, 0), 2 * parts, BLOCK_N)
    if not BY_TILE:  # noqa: SIM102
        if (length == 0) | (count == 0):
            return
    width = pick(layer, N0, N1, N2, GROUP)
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
    # Asked for with the rank, as far as the table reaches.
    wide_page = load_pages(pages, tl.arange(0, RANKS), columns, PAGE) if RANKS > EXPAND_RANKS else page
    begin, count = shared_outputs(begin, count, rank, width, RANKS, SHARES)
    if (rank == 0 if ADDS else length == 0) | (count == 0):
        return
    B = pick(layer, B0, B1, B2, GROUP)
    y_stride = pick(layer, Y_STRIDE0, Y_STRIDE1, Y_STRIDE2, GROUP)
    y = pick(layer, y0, y1, y2, GROUP) + row[:, None] * y_stride
    is_row = m < length
    source = partials + (tile * GROUP + layer).to(tl.int64) * SPLIT * TILE * max_rank + m[:, None] * max_rank
    end = tl.minimum(begin + count, width)
    few_stages: tl.constexpr = STAGES if RANKS == EXPAND_RANKS else FEW_STAGES
    if rank <= EXPAND_RANKS:
        expand_ranks(
            y, source, B, page, rank, is_row, begin, end, width, max_rank, PAGE, TILE, SPLIT, PART_N, few_stages, ADDS,
            EXPAND_RANKS,
        )  # fmt: skip
    elif RANKS > EXPAND_RANKS:
        if rank <= RANKS:
            expand_ranks(
                y, source, B, wide_page, rank, is_row, begin, end, width, max_rank, PAGE, TILE, SPLIT, PART_N, STAGES,
                ADDS, RANKS,
            )  # fmt: skip
        else:
            expand_blocks(
                y, source, B, pages, columns, rank, is_row, begin, end, width, max_rank, PAGE, TILE, SPLIT, PART_N,
                ADDS,
            )  # fmt: skip
    else:
        expand_blocks(
            y, source, B, pages, columns, rank, is_row, begin, end, width, max_rank, PAGE, TILE, SPLIT, PART_N, ADDS,
        )  # fmt: skip
