"""``lora_gate_triton``'s expand and activation, with the next blocks on their way meanwhile (``lora_expand_loop``).

With DOWN the shrink of the layer that reads the activation is in it too: each block of the activation is multiplied by
its part of that layer's A while it is there. Partial sums are of half a program's columns whatever the program has of
them, so that a row's bits do not depend on how many tiles are used: float32 ``[tiles, parts, TILE, max_rank]``, part p
of the columns from ``p * BLOCK_N // 2`` on, as many as there are such columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_dist.kernels.lora_expand_loop import halves_of, own_outputs
from peft_dist.kernels.lora_triton_parts import EXPAND_RANKS, expand_part, find_adapter, gated, load_b, load_pages


@triton.jit
def _add_block(acc, value, A_row, r, rank, n, N: tl.constexpr):
    """``acc`` and a block of the activation, ``[TILE, len(n)]``, times its part of A: ``[TILE, EXPAND_RANKS]``."""
    a = tl.load(A_row[None, :] + n[:, None], mask=(r < rank)[None, :] & (n < N)[:, None], other=0.0)
    return tl.dot(value, a, acc)


@triton.jit
def _keep_part(acc, to, scaling, r, rank, is_row, first, end, max_rank, HALF_N: tl.constexpr, PART_N: tl.constexpr,
               TILE: tl.constexpr):  # fmt: skip
    """Store ``acc`` where a part of the columns ends with the block from ``first`` on; what the next block adds to."""
    if ((first + PART_N) % HALF_N == 0) | (first + PART_N >= end):
        stored = (rank + EXPAND_RANKS - 1) // EXPAND_RANKS * EXPAND_RANKS
        mask = is_row[:, None] & (r < stored)[None, :]
        tl.store(to + (first // HALF_N) * (TILE * max_rank) + r[None, :], acc * scaling, mask=mask)
        acc = tl.zeros_like(acc)
    return acc


@triton.jit
def _shrink_rest(
    place, to, A, pages, columns, rank, scaling, is_row, begin, end, max_rank,
    N: tl.constexpr, HALF_N: tl.constexpr, PART_N: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The ranks that were not in work while the activation was made: it is read again."""
    tl.debug_barrier()
    first_rank = 0 + EXPAND_RANKS
    while first_rank < rank:
        r = first_rank + tl.arange(0, EXPAND_RANKS)
        A_row = A + (load_pages(pages, r, columns, PAGE) * PAGE + r % PAGE).to(tl.int64) * N
        acc = tl.zeros((TILE, EXPAND_RANKS), tl.float32)
        for first in range(begin, end, PART_N):
            n = first + tl.arange(0, PART_N)
            value = tl.load(place + n[None, :], mask=is_row[:, None] & (n < end)[None, :], other=0.0)
            acc = _add_block(acc, value, A_row, r, rank, n, N)
            acc = _keep_part(acc, to, scaling, r, rank, is_row, first, end, max_rank, HALF_N, PART_N, TILE)
        first_rank += EXPAND_RANKS


@triton.jit(
    do_not_specialize=[
        *("gate_table", "gate_slots", "gate_columns", "up_table", "up_slots", "up_columns", "watched"),
        *("down_table", "down_slots", "down_columns"),
    ]
)
def gate_loop_kernel(
    gate,
    up,
    out,
    partials,
    tile_rows,
    tile_slots,
    tile_lens,
    gate_B,
    gate_pages,
    gate_ranks,
    gate_table,
    gate_slots,
    gate_columns,
    up_B,
    up_pages,
    up_ranks,
    up_table,
    up_slots,
    up_columns,
    down_partials,
    down_A,
    down_pages,
    down_ranks,
    down_scalings,
    down_table,
    down_slots,
    down_columns,
    down_factor,
    watched,
    max_rank,
    N: tl.constexpr,
    GATE_STRIDE: tl.constexpr,
    UP_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART_N: tl.constexpr,
    STAGES: tl.constexpr,
    SILU: tl.constexpr,
    DOWN: tl.constexpr,
    BY_TILE: tl.constexpr,
):
    """Program (tile, part of the columns). GROUP: layers of the shrink; the one that it lacked has no slots here."""
    HALF_N: tl.constexpr = BLOCK_N // 2
    tile = tl.program_id(0)
    m = tl.arange(0, TILE)
    length = tl.load(tile_lens + tile)
    slot = tl.load(tile_slots + tile)
    row = tl.load(tile_rows + tile * TILE + m).to(tl.int64)
    begin, count = own_outputs(tile_lens, watched, tl.program_id(1), tl.num_programs(1), BLOCK_N)
    if BY_TILE:
        slot, live = tile, 1
    else:
        live = length
        if (length == 0) | (count == 0):
            return
    gate_pages, gate_rank, gate_page = find_adapter(
        gate_pages, gate_ranks, gate_table, gate_slots, gate_columns, slot, live, PAGE
    )
    up_pages, up_rank, up_page = find_adapter(up_pages, up_ranks, up_table, up_slots, up_columns, slot, live, PAGE)
    down_acc = tl.zeros((TILE, EXPAND_RANKS), tl.float32)
    if DOWN:
        is_down = (slot >= 0) & (slot < down_slots)
        scaling = tl.load(down_scalings + tl.where(is_down, slot, 0) * down_table, mask=is_down, other=0.0)
        scaling *= down_factor
        down_pages, down_rank, down_page = find_adapter(
            down_pages, down_ranks, down_table, down_slots, down_columns, slot, live, PAGE
        )
    if (length == 0) | (count == 0):
        return
    is_row = m < length
    gate_y = gate + row[:, None] * GATE_STRIDE
    up_y = up + row[:, None] * UP_STRIDE
    place = out + row[:, None] * OUT_STRIDE
    gate_source = partials + (tile * GROUP).to(tl.int64) * SPLIT * TILE * max_rank + m[:, None] * max_rank
    up_source = gate_source + (GROUP - 1) * SPLIT * TILE * max_rank
    r = tl.arange(0, EXPAND_RANKS)
    if DOWN:
        parts: tl.constexpr = (N + HALF_N - 1) // HALF_N
        down_to = down_partials + tile.to(tl.int64) * (parts * TILE) * max_rank + m[:, None] * max_rank
        down_row = down_A + (down_page * PAGE + r % PAGE).to(tl.int64) * N
    end = tl.minimum(begin + count, N)
    if (gate_rank <= EXPAND_RANKS) & (up_rank <= EXPAND_RANKS):
        # Rows of the base come through here too, with no ranks: their products are of zeros, and no B is read.
        dtype = gate_B.dtype.element_ty
        gate_high, gate_low = halves_of(gate_source, gate_rank, is_row, max_rank, TILE, SPLIT, dtype)
        up_high, up_low = halves_of(up_source, up_rank, is_row, max_rank, TILE, SPLIT, dtype)
        gate_row = gate_B + ((gate_page * PAGE + r % PAGE).to(tl.int64) * N)[:, None]
        up_row = up_B + ((up_page * PAGE + r % PAGE).to(tl.int64) * N)[:, None]
        for first in tl.range(begin, end, PART_N, num_stages=STAGES):
            n = first + tl.arange(0, PART_N)
            gate_b = tl.load(gate_row + n[None, :], mask=(r < gate_rank)[:, None] & (n < N)[None, :], other=0.0)
            up_b = tl.load(up_row + n[None, :], mask=(r < up_rank)[:, None] & (n < N)[None, :], other=0.0)
            mask = is_row[:, None] & (n < end)[None, :]
            x = tl.load(gate_y + n[None, :], mask=mask, other=0.0).to(tl.float32)
            factor = tl.load(up_y + n[None, :], mask=mask, other=0.0).to(tl.float32)
            x = tl.dot(gate_low, gate_b, tl.dot(gate_high, gate_b, x))
            factor = tl.dot(up_low, up_b, tl.dot(up_high, up_b, factor))
            activated = gated(x, factor, SILU).to(out.dtype.element_ty)
            tl.store(place + n[None, :], activated, mask=mask)
            if DOWN:
                down_acc = _add_block(down_acc, activated, down_row, r, down_rank, n, N)
                down_acc = _keep_part(
                    down_acc, down_to, scaling, r, down_rank, is_row, first, end, max_rank, HALF_N, PART_N, TILE
                )
    else:
        for first in range(begin, end, PART_N):
            n = first + tl.arange(0, PART_N)
            mask = is_row[:, None] & (n < end)[None, :]
            gate_b = load_b(gate_B, gate_page, r, gate_rank, n, N, PAGE)
            up_b = load_b(up_B, up_page, r, up_rank, n, N, PAGE)
            x = tl.load(gate_y + n[None, :], mask=mask, other=0.0).to(tl.float32)
            factor = tl.load(up_y + n[None, :], mask=mask, other=0.0).to(tl.float32)
            x += expand_part(
                gate_source, gate_B, gate_b, gate_pages, gate_columns, gate_rank, is_row, n, N, max_rank,
                PAGE, TILE, SPLIT, PART_N, False,
            )  # fmt: skip
            factor += expand_part(
                up_source, up_B, up_b, up_pages, up_columns, up_rank, is_row, n, N, max_rank,
                PAGE, TILE, SPLIT, PART_N, False,
            )  # fmt: skip
            activated = gated(x, factor, SILU).to(out.dtype.element_ty)
            tl.store(place + n[None, :], activated, mask=mask)
            if DOWN:
                down_acc = _add_block(down_acc, activated, down_row, r, down_rank, n, N)
                down_acc = _keep_part(
                    down_acc, down_to, scaling, r, down_rank, is_row, first, end, max_rank, HALF_N, PART_N, TILE
                )
    if DOWN:  # noqa: SIM102
        if down_rank > EXPAND_RANKS:
            _shrink_rest(
                place, down_to, down_A, down_pages, down_columns, down_rank, scaling, is_row, begin, end, max_rank,
                N, HALF_N, PART_N, PAGE, TILE,
            )  # fmt: skip
