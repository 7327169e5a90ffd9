"""Attention of decodes over a paged cache, each sequence's keys split among several programs.

The number of splits is fixed by the launch; each works out on the device which keys are its own, and those without
any exit. With more than one split a second kernel combines the parts (Flash-Decoding: Dao et al. 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from peft_dist.kernels.attention_triton_tile import attend_tile
from peft_dist.kernels.types import AttentionMetadata, KVCache

MAX_SPLITS = 64


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
    return DecodeTile(64 if head_dim <= 128 else 32, 4, 5)


def splits_for(num_seqs: int, num_kv_heads: int, max_context: int, keys: int, processors: int) -> int:
    """As many as give each multiprocessor two programs, none of them less than two tiles of the longest context.

    A power of two, so that few kernels are compiled.
    """
    wanted = min(2 * processors // (num_seqs * num_kv_heads), max_context // (2 * keys), MAX_SPLITS)
    return 1 << max(wanted, 1).bit_length() - 1


@triton.jit
def _own_keys(context, window, split, KEYS: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr):
    """(first key, one after the last, splits that have keys) of a split."""
    begin = 0
    if WINDOW:
        begin = tl.maximum(context - window, 0)
    tiles = tl.cdiv(context - begin, KEYS)
    each = tl.cdiv(tiles, SPLITS)
    first = begin + split * each * KEYS
    return first, tl.minimum(first + each * KEYS, context), tl.cdiv(tiles, tl.maximum(each, 1))


@triton.jit(do_not_specialize=["table_row"])
def _decode_kernel(
    query,
    out,
    parts,
    part_sums,
    sinks,
    key_cache,
    value_cache,
    block_tables,
    query_start_loc,
    context_lens,
    scale,
    cap,
    window,
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
    SPLITS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SKIP_CHUNKS: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
):
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1)
    split = tl.program_id(2)
    token = tl.load(query_start_loc + sequence)
    if SKIP_CHUNKS:  # noqa: SIM102 - known when compiled
        if tl.load(query_start_loc + sequence + 1) - token != 1:
            return
    context = tl.load(context_lens + sequence)
    first, end, _ = _own_keys(context, window, split, KEYS, SPLITS, WINDOW)
    if first >= end:
        return

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
    table = block_tables + sequence * table_row
    key_cache += kv_head * key_head
    value_cache += kv_head * value_head
    for key in tl.range(first, end, KEYS):
        acc, top, total = attend_tile(
            acc, top, total, q, key + tl.arange(0, KEYS), end, rows, table, key_cache, value_cache, key_block,
            key_slot, value_block, value_slot, scale, cap, window, KEY_DIM, VALUE_DIM, KEY_COLUMNS, VALUE_COLUMNS,
            BLOCK_SIZE, TAIL=True, CAUSAL=False, WINDOW=False, CAP=CAP,
        )  # fmt: skip
    acc = acc / total[:, None]
    value_columns = tl.arange(0, VALUE_COLUMNS)
    inside = has_row[:, None] & (value_columns < VALUE_DIM)[None, :]
    if SPLITS == 1:
        place = out + token.to(tl.int64) * out_token + (heads * out_head)[:, None] + value_columns[None, :]
        tl.store(place, acc.to(out.dtype.element_ty), mask=inside)
    else:
        part = (sequence.to(tl.int64) * tl.num_programs(0) * GROUP + heads) * SPLITS + split
        tl.store(parts + part[:, None] * VALUE_DIM + value_columns[None, :], acc, mask=inside)
        tl.store(part_sums + part, top + tl.log2(total), mask=has_row)


@triton.jit
def _combine_kernel(
    out,
    parts,
    part_sums,
    query_start_loc,
    context_lens,
    window,
    out_token,
    out_head,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    SKIP_CHUNKS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    token = tl.load(query_start_loc + sequence)
    if SKIP_CHUNKS:  # noqa: SIM102 - known when compiled
        if tl.load(query_start_loc + sequence + 1) - token != 1:
            return
    context = tl.load(context_lens + sequence)
    if context == 0:
        return
    _, _, filled = _own_keys(context, window, 0, KEYS, SPLITS, WINDOW)
    splits = tl.arange(0, SPLITS)
    columns = tl.arange(0, VALUE_COLUMNS)
    part = (sequence.to(tl.int64) * tl.num_programs(0) + head) * SPLITS + splits
    sums = tl.load(part_sums + part, mask=splits < filled, other=float("-inf"))
    weights = tl.exp2(sums - tl.max(sums, 0))
    values = tl.load(
        parts + part[:, None] * VALUE_DIM + columns[None, :],
        mask=(splits < filled)[:, None] & (columns < VALUE_DIM)[None, :],
        other=0.0,
    )
    result = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)
    place = out + token.to(tl.int64) * out_token + head * out_head + columns
    tl.store(place, result.to(out.dtype.element_ty), mask=columns < VALUE_DIM)


def attend_decodes(
    out: torch.Tensor,
    query: torch.Tensor,
    cache: KVCache,
    meta: AttentionMetadata,
    factors: tuple[float, float],
    window: int | None,
    sinks: torch.Tensor | None,
    tile: DecodeTile,
    num_splits: int,
    skip_chunks: bool,
) -> None:
    """Write the rows of ``out`` (``[T, num_heads, value_dim]``) of sequences with one query token.

    Args:
        factors: (scale, cap) of ``attend_tile``; cap 0 is none.
        num_splits: A power of two.
        skip_chunks: Leave out sequences with more query tokens; without it there must be none.
    """
    num_heads, key_dim = query.shape[1:]
    num_kv_heads, value_dim = cache.value.shape[2:]
    group = num_heads // num_kv_heads
    parts, part_sums = _parts(meta, num_heads, num_splits, value_dim, out)
    value_columns = max(16, triton.next_power_of_2(value_dim))
    _decode_kernel[(num_kv_heads, meta.num_seqs, num_splits)](
        query,
        out,
        parts,
        part_sums,
        query if sinks is None else sinks,
        *cache,
        meta.block_tables_t,
        meta.query_start_loc_t,
        meta.context_lens_t,
        *factors,
        window or 0,
        *query.stride()[:2],
        *out.stride()[:2],
        *cache.key.stride()[:3],
        *cache.value.stride()[:3],
        meta.block_tables_t.stride(0),
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        KEYS=tile.keys,
        SPLITS=num_splits,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_COLUMNS=max(16, triton.next_power_of_2(key_dim)),
        VALUE_COLUMNS=value_columns,
        BLOCK_SIZE=cache.key.shape[1],
        SKIP_CHUNKS=skip_chunks,
        SINKS=sinks is not None,
        WINDOW=window is not None,
        CAP=factors[1] != 0.0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if num_splits > 1:
        _combine_kernel[(num_heads, meta.num_seqs)](
            out,
            parts,
            part_sums,
            meta.query_start_loc_t,
            meta.context_lens_t,
            window or 0,
            *out.stride()[:2],
            KEYS=tile.keys,
            SPLITS=num_splits,
            VALUE_DIM=value_dim,
            VALUE_COLUMNS=value_columns,
            SKIP_CHUNKS=skip_chunks,
            WINDOW=window is not None,
            num_warps=4 if num_splits * value_columns >= 4096 else 2,
        )


def _parts(
    meta: AttentionMetadata, num_heads: int, num_splits: int, value_dim: int, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for each split's result and the logarithm of its sum; layers of one shape share it."""
    if num_splits == 1:
        return out, out
    shape = (meta.num_seqs, num_heads, num_splits)
    key = ("triton_parts", *shape, value_dim)
    if key not in meta.scratch:
        floats = {"dtype": torch.float32, "device": out.device}
        meta.scratch[key] = torch.empty(*shape, value_dim, **floats), torch.empty(shape, **floats)  # type: ignore[arg-type]
    return meta.scratch[key]  # type: ignore[return-value]
