"""Attention of prefill chunks over a paged cache: all chunks of a batch in one launch, whatever their lengths.

The query heads of one key head, for a few query tokens, are the rows of a tile, so that each key is read once for all
of them. Tiles are numbered over the packed queries; each program finds its sequence by a search in
``query_start_loc``, so the launch needs no value that only the device knows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from peft_dist.kernels.attention_triton_tile import attend_tile
from peft_dist.kernels.types import AttentionMetadata, KVCache


class ChunkTile(NamedTuple):
    """``rows`` of queries (tokens times heads of a group) by ``keys``, on so many warps and pipeline stages."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def tile_for(dtype: torch.dtype, head_dim: int) -> ChunkTile:
    """What fits an H100's registers and shared memory."""
    if dtype == torch.float32:
        return ChunkTile(32, 32, 8, 1) if head_dim <= 128 else ChunkTile(16, 16, 8, 1)
    return ChunkTile(128, 64 if head_dim <= 128 else 32, 8, 3)


@triton.jit(do_not_specialize=["num_seqs", "table_row"])
def _chunk_kernel(
    query,
    out,
    sinks,
    key_cache,
    value_cache,
    block_tables,
    query_start_loc,
    context_lens,
    num_seqs,
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
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SKIP_DECODES: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
):
    kv_head = tl.program_id(0)
    # The last tiles of a sequence have the most keys: they start first.
    index = tl.num_programs(1) - 1 - tl.program_id(1)
    # Sequence s has the tiles from query_start_loc[s] // TOKENS + s on: enough for any length, some too many.
    sequence = index * 0
    after = num_seqs
    while after - sequence > 1:
        middle = (sequence + after) // 2
        if tl.load(query_start_loc + middle) // TOKENS + middle <= index:
            sequence = middle
        else:
            after = middle
    start = tl.load(query_start_loc + sequence)
    length = tl.load(query_start_loc + sequence + 1) - start
    first = (index - start // TOKENS - sequence) * TOKENS
    if first >= length:
        return
    if SKIP_DECODES:  # noqa: SIM102 - known when compiled
        if length == 1:
            return
    context = tl.load(context_lens + sequence)

    rows = tl.arange(0, ROWS)
    tokens = first + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    has_row = (rows < TOKENS * GROUP) & (tokens < length)
    first_position = context - length + first
    positions = context - length + tokens
    key_columns = tl.arange(0, KEY_COLUMNS)
    row_tokens = (start + tokens).to(tl.int64)
    q = tl.load(
        query + (row_tokens * query_token + heads * query_head)[:, None] + key_columns[None, :],
        mask=has_row[:, None] & (key_columns < KEY_DIM)[None, :],
        other=0.0,
    )
    if SINKS:
        top = tl.load(sinks + heads, mask=has_row, other=0.0).to(tl.float32) * 1.4426950408889634
        total = tl.full([ROWS], 1.0, tl.float32)
    else:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_COLUMNS], tl.float32)

    end = context - length + tl.minimum(first + TOKENS, length)
    table = block_tables + sequence * table_row
    key_cache += kv_head * key_head
    value_cache += kv_head * value_head
    begin = 0
    # Tiles that every row sees whole need no mask.
    masked = (first_position + 1) // KEYS * KEYS
    if WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // KEYS * KEYS
        masked = begin
    for key in tl.range(begin, masked, KEYS):
        acc, top, total = attend_tile(
            acc, top, total, q, key + tl.arange(0, KEYS), end, positions, table, key_cache, value_cache, key_block,
            key_slot, value_block, value_slot, scale, cap, window, KEY_DIM, VALUE_DIM, KEY_COLUMNS, VALUE_COLUMNS,
            BLOCK_SIZE, TAIL=False, CAUSAL=False, WINDOW=False, CAP=CAP,
        )  # fmt: skip
    for key in tl.range(masked, end, KEYS):
        acc, top, total = attend_tile(
            acc, top, total, q, key + tl.arange(0, KEYS), end, positions, table, key_cache, value_cache, key_block,
            key_slot, value_block, value_slot, scale, cap, window, KEY_DIM, VALUE_DIM, KEY_COLUMNS, VALUE_COLUMNS,
            BLOCK_SIZE, TAIL=True, CAUSAL=True, WINDOW=WINDOW, CAP=CAP,
        )  # fmt: skip
    value_columns = tl.arange(0, VALUE_COLUMNS)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out + (row_tokens * out_token + heads * out_head)[:, None] + value_columns[None, :],
        acc.to(out.dtype.element_ty),
        mask=has_row[:, None] & (value_columns < VALUE_DIM)[None, :],
    )


def attend_chunks(
    out: torch.Tensor,
    query: torch.Tensor,
    cache: KVCache,
    meta: AttentionMetadata,
    factors: tuple[float, float],
    window: int | None,
    sinks: torch.Tensor | None,
    tile: ChunkTile,
    skip_decodes: bool,
) -> None:
    """Write the rows of ``out`` (``[T, num_heads, value_dim]``) of all sequences.

    Args:
        factors: (scale, cap) of ``attend_tile``; cap 0 is none.
        skip_decodes: Leave out sequences with one query token.
    """
    num_tokens, num_heads, key_dim = query.shape
    num_kv_heads, value_dim = cache.value.shape[2:]
    group = num_heads // num_kv_heads
    rows = max(tile.rows, triton.next_power_of_2(group))
    tokens = rows // group
    grid = (num_kv_heads, num_tokens // tokens + meta.num_seqs)
    _chunk_kernel[grid](
        query,
        out,
        query if sinks is None else sinks,
        *cache,
        meta.block_tables_t,
        meta.query_start_loc_t,
        meta.context_lens_t,
        meta.num_seqs,
        *factors,
        window or 0,
        *query.stride()[:2],
        *out.stride()[:2],
        *cache.key.stride()[:3],
        *cache.value.stride()[:3],
        meta.block_tables_t.stride(0),
        GROUP=group,
        TOKENS=tokens,
        ROWS=rows,
        KEYS=tile.keys,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_COLUMNS=max(16, triton.next_power_of_2(key_dim)),
        VALUE_COLUMNS=max(16, triton.next_power_of_2(value_dim)),
        BLOCK_SIZE=cache.key.shape[1],
        SKIP_DECODES=skip_decodes,
        SINKS=sinks is not None,
        WINDOW=window is not None,
        CAP=factors[1] != 0.0,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
