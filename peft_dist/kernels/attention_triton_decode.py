"""Attention of decodes over a paged cache; long sequences' keys are split among several programs.

Each program takes one item of the schedule (``attention_triton_schedule``) for one key head. Of a sequence that was
split, the program that finishes last puts the parts together (Flash-Decoding: Dao et al. 2023), so that there is no
second launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from peft_dist.kernels.attention_triton_schedule import (
    BEGIN,
    END,
    FIELDS,
    SEQUENCE,
    SPLIT,
    SPLITS,
    TOKEN,
    schedule_decodes,
)
from peft_dist.kernels.attention_triton_tile import attend_tile
from peft_dist.kernels.types import AttentionMetadata, KVCache


class DecodeTile(NamedTuple):
    """Keys that a program reads at a time, on so many warps and pipeline stages."""

    keys: int
    num_warps: int
    num_stages: int


def tile_for(dtype: torch.dtype, head_dim: int) -> DecodeTile:
    """What fits an H100's registers and shared memory twice, so that one program loads while another computes.

    Blocks are looked up before they are read: five stages are two tiles under way.
    """
    if dtype == torch.float32:
        return DecodeTile(32 if head_dim <= 128 else 16, 4, 1)
    return DecodeTile(32, 4, 5)


@triton.jit(do_not_specialize=["table_row"])
def _decode_kernel(
    query,
    out,
    parts,
    part_sums,
    items,
    arrivals,
    sinks,
    key_cache,
    value_cache,
    block_tables,
    scale,
    cap,
    query_token,
    query_head,
    out_token,
    out_head,
    key_block,
    key_slot,
    key_head,
    value_block,
    value_slot,
    value_head,
    table_row,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SINKS: tl.constexpr,
    CAP: tl.constexpr,
):
    """Program (key head, item). ALIGNED: parts begin at multiples of KEYS."""
    kv_head = tl.program_id(0)
    number = tl.program_id(1)
    item = items + number * FIELDS
    splits = tl.load(item + SPLITS)
    sequence = tl.load(item + SEQUENCE)
    token = tl.load(item + TOKEN)
    first = tl.load(item + BEGIN)
    end = tl.load(item + END)
    split = tl.load(item + SPLIT)
    if splits == 0:
        return
    if ALIGNED:
        first = tl.multiple_of(first, KEYS)

    rows = tl.arange(0, ROWS)
    heads = kv_head * GROUP + rows
    has_row = rows < GROUP
    key_columns = tl.arange(0, KEY_COLUMNS)
    q = tl.load(
        query + token.to(tl.int64) * query_token + (heads * query_head)[:, None] + key_columns[None, :],
        mask=has_row[:, None] & (key_columns < KEY_DIM)[None, :],
        other=0.0,
    )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:  # noqa: SIM102 - known when compiled
        if split == 0:
            top = tl.load(sinks + heads, mask=has_row, other=0.0).to(tl.float32) * 1.4426950408889634
            total = tl.full([ROWS], 1.0, tl.float32)
    acc = tl.zeros([ROWS, VALUE_COLUMNS], tl.float32)
    table = block_tables + sequence.to(tl.int64) * table_row
    key_cache += kv_head * key_head
    value_cache += kv_head * value_head
    for key in tl.range(first, end, KEYS):
        acc, top, total = attend_tile(
            acc, top, total, q, key + tl.arange(0, KEYS), end, rows, table, key_cache, value_cache, key_block,
            key_slot, value_block, value_slot, scale, cap, 0, KEY_DIM, VALUE_DIM, KEY_COLUMNS, VALUE_COLUMNS,
            BLOCK_SIZE, TAIL=True, CAUSAL=False, WINDOW=False, CAP=CAP,
        )  # fmt: skip
    acc = acc / total[:, None]
    value_columns = tl.arange(0, VALUE_COLUMNS)
    inside = has_row[:, None] & (value_columns < VALUE_DIM)[None, :]
    place = out + token.to(tl.int64) * out_token + (heads * out_head)[:, None] + value_columns[None, :]
    if splits == 1:
        tl.store(place, acc.to(out.dtype.element_ty), mask=inside)
        return
    num_heads = tl.num_programs(0) * GROUP
    part = number.to(tl.int64) * num_heads + heads
    tl.store(parts + part[:, None] * VALUE_DIM + value_columns[None, :], acc, mask=inside)
    tl.store(part_sums + part, top + tl.log2(total), mask=has_row)
    # All of this program's stores come before its arrival, and those of the others before what the last one reads.
    tl.debug_barrier()
    counter = arrivals + (number - split) * tl.num_programs(0) + kv_head
    if tl.atomic_add(counter, 1, sem="acq_rel") != splits - 1:
        return
    tl.store(counter, 0)
    _combine(
        parts, part_sums, out + token.to(tl.int64) * out_token, out_head, number - split, splits, kv_head * GROUP,
        num_heads, GROUP, VALUE_DIM, VALUE_COLUMNS,
    )  # fmt: skip


@triton.jit
def _combine(
    parts,
    part_sums,
    out,
    out_head,
    first,
    splits,
    first_head,
    num_heads,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
):
    """One sequence's rows of one key head, ``out`` being its row. Eight parts are asked for at once."""
    heads = first_head + tl.arange(0, triton.next_power_of_2(GROUP))
    has_head = heads < first_head + GROUP
    columns = tl.arange(0, VALUE_COLUMNS)
    inside = has_head[:, None] & (columns < VALUE_DIM)[None, :]
    place = first.to(tl.int64) * num_heads + heads
    top = tl.full(heads.shape, float("-inf"), tl.float32)
    for split in range(0, splits, 8):
        for i in tl.static_range(8):
            there = place + (split + i) * num_heads
            # What others wrote is not in this processor's own cache.
            log_sum = tl.load(
                part_sums + there, mask=has_head & (split + i < splits), other=float("-inf"), cache_modifier=".cg"
            )
            top = tl.maximum(top, log_sum)
    total = tl.zeros(heads.shape, tl.float32)
    acc = tl.zeros([triton.next_power_of_2(GROUP), VALUE_COLUMNS], tl.float32)
    for split in range(0, splits, 8):
        for i in tl.static_range(8):
            there = place + (split + i) * num_heads
            is_part = has_head & (split + i < splits)
            log_sum = tl.load(part_sums + there, mask=is_part, other=float("-inf"), cache_modifier=".cg")
            values = tl.load(
                parts + there[:, None] * VALUE_DIM + columns[None, :],
                mask=inside & is_part[:, None],
                other=0.0,
                cache_modifier=".cg",
            )
            weight = tl.where(is_part, tl.exp2(log_sum - top), 0.0)
            total += weight
            acc += weight[:, None] * values
    result = acc / tl.where(has_head, total, 1.0)[:, None]
    tl.store(out + (heads * out_head)[:, None] + columns[None, :], result.to(out.dtype.element_ty), mask=inside)


def attend_decodes(
    out: torch.Tensor,
    query: torch.Tensor,
    cache: KVCache,
    meta: AttentionMetadata,
    factors: tuple[float, float],
    window: int | None,
    sinks: torch.Tensor | None,
    tile: DecodeTile,
    splits: int,
) -> None:
    """Write the rows of ``out`` (``[T, num_heads, value_dim]``) of sequences with one query token.

    Args:
        factors: (scale, cap) of ``attend_tile``; cap 0 is none.
        splits: ``attention_triton_schedule.extra_parts``.
    """
    num_heads, key_dim = query.shape[1:]
    num_kv_heads, value_dim = cache.value.shape[2:]
    group = num_heads // num_kv_heads
    items, arrivals = schedule_decodes(meta, num_kv_heads, splits, tile.keys, window)
    parts, part_sums = _parts(meta, len(items), num_heads, value_dim, out.device)
    _decode_kernel[(num_kv_heads, len(items))](
        query,
        out,
        parts,
        part_sums,
        items,
        arrivals,
        query if sinks is None else sinks,
        *cache,
        meta.block_tables_t,
        *factors,
        *query.stride()[:2],
        *out.stride()[:2],
        *cache.key.stride()[:3],
        *cache.value.stride()[:3],
        meta.block_tables_t.stride(0),
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        KEYS=tile.keys,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_COLUMNS=max(16, triton.next_power_of_2(key_dim)),
        VALUE_COLUMNS=max(16, triton.next_power_of_2(value_dim)),
        BLOCK_SIZE=cache.key.shape[1],
        ALIGNED=window is None,
        SINKS=sinks is not None,
        CAP=factors[1] != 0.0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _parts(
    meta: AttentionMetadata, num_items: int, num_heads: int, value_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for each part's result and the logarithm of its sum, float32; layers of one shape share it."""
    key = ("triton_parts", num_items, num_heads, value_dim)
    if key not in meta.scratch:
        parts = torch.empty(num_items, num_heads, value_dim, dtype=torch.float32, device=device)
        meta.scratch[key] = parts, torch.empty(num_items, num_heads, dtype=torch.float32, device=device)
    return meta.scratch[key]  # type: ignore[return-value]
