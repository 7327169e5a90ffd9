"""``lora_gate_triton``'s expand and activation, with the next blocks on their way meanwhile (``lora_expand_loop``)."""

from __future__ import annotations

import triton
import triton.language as tl

from peft_dist.kernels.lora_expand_loop import FEW_STAGES, halves_of, own_outputs, shared_outputs
from peft_dist.kernels.lora_triton_parts import EXPAND_RANKS, expand_part, find_adapter, gated, load_b, load_pages


@triton.jit
def _gate_ranks(
    gate_y, up_y, place, gate_source, up_source, gate_B, up_B, gate_page, up_page, gate_rank, up_rank, is_row,
    begin, end, max_rank, N: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, PART_N: tl.constexpr, STAGES: tl.constexpr,
    SILU: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Columns ``begin`` to ``end`` of adapters of up to RANKS ranks; the pages are theirs.

    Rows of the base come through here too, with no ranks: their products are of zeros, and no B is read.
    """
    r = tl.arange(0, RANKS)
    dtype = gate_B.dtype.element_ty
    gate_high, gate_low = halves_of(gate_source, gate_rank, is_row, max_rank, TILE, SPLIT, dtype, RANKS)
    up_high, up_low = halves_of(up_source, up_rank, is_row, max_rank, TILE, SPLIT, dtype, RANKS)
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
        tl.store(place + n[None, :], gated(x, factor, SILU).to(place.dtype.element_ty), mask=mask)


@triton.jit
def _gate_blocks(
    gate_y, up_y, place, gate_source, up_source, gate_B, up_B, gate_page, up_page, gate_pages, up_pages,
    gate_columns, up_columns, gate_rank, up_rank, is_row, begin, end, max_rank, N: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, PART_N: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The same of any ranks, one block after another: each adds the intermediates up again."""
    r = tl.arange(0, EXPAND_RANKS)
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
        tl.store(place + n[None, :], gated(x, factor, SILU).to(place.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        *("gate_table", "gate_slots", "gate_columns", "up_table", "up_slots", "up_columns", "watched"),
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
    BY_TILE: tl.constexpr,
    RANKS: tl.constexpr,
    SHARES: tl.constexpr,
):
    """Program (tile, part of the columns). GROUP: layers of the shrink; the one that it lacked has no slots here."""
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
    rank = tl.maximum(gate_rank, up_rank)
    # Asked for with the ranks, as far as the tables reach.
    gate_wide, up_wide = gate_page, up_page
    if RANKS > EXPAND_RANKS:
        wide = tl.arange(0, RANKS)
        gate_wide = load_pages(gate_pages, wide, gate_columns, PAGE)
        up_wide = load_pages(up_pages, wide, up_columns, PAGE)
    begin, count = shared_outputs(begin, count, rank, N, RANKS, SHARES)
    if (length == 0) | (count == 0):
        return
    is_row = m < length
    gate_y = gate + row[:, None] * GATE_STRIDE
    up_y = up + row[:, None] * UP_STRIDE
    place = out + row[:, None] * OUT_STRIDE
    gate_source = partials + (tile * GROUP).to(tl.int64) * SPLIT * TILE * max_rank + m[:, None] * max_rank
    up_source = gate_source + (GROUP - 1) * SPLIT * TILE * max_rank
    end = tl.minimum(begin + count, N)
    few_stages: tl.constexpr = STAGES if RANKS == EXPAND_RANKS else FEW_STAGES
    if rank <= EXPAND_RANKS:
        _gate_ranks(
            gate_y, up_y, place, gate_source, up_source, gate_B, up_B, gate_page, up_page, gate_rank, up_rank, is_row,
            begin, end, max_rank, N, PAGE, TILE, SPLIT, PART_N, few_stages, SILU, EXPAND_RANKS,
        )  # fmt: skip
    elif RANKS > EXPAND_RANKS:
        if rank <= RANKS:
            _gate_ranks(
                gate_y, up_y, place, gate_source, up_source, gate_B, up_B, gate_wide, up_wide, gate_rank, up_rank,
                is_row, begin, end, max_rank, N, PAGE, TILE, SPLIT, PART_N, STAGES, SILU, RANKS,
            )  # fmt: skip
        else:
            _gate_blocks(
                gate_y, up_y, place, gate_source, up_source, gate_B, up_B, gate_page, up_page, gate_pages,
                up_pages, gate_columns, up_columns, gate_rank, up_rank, is_row, begin, end, max_rank, N, PAGE, TILE,
                SPLIT, PART_N, SILU,
            )  # fmt: skip
    else:
        _gate_blocks(
            gate_y, up_y, place, gate_source, up_source, gate_B, up_B, gate_page, up_page, gate_pages, up_pages,
            gate_columns, up_columns, gate_rank, up_rank, is_row, begin, end, max_rank, N, PAGE, TILE, SPLIT, PART_N,
            SILU,
        )  # fmt: skip
