"""The expand of q/k/v, rotary embedding, and the KV write, in one pass over the joint projection's outputs.

An expand of its own reads those outputs, adds to them and writes them, only to have ``glue_triton`` read them again.
Here a program has one head of one of the three layers, and some of a tile's rows, one after another: B stays. Sums are
float32 up to the turned values, which are rounded once. A row gets the same bits beside any others.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import triton
import triton.language as tl

from peft_dist.kernels.lora_group import even_rows, expand_tables, group_of, is_wide, tiles_of
from peft_dist.kernels.lora_lookup_triton import lookup_of
from peft_dist.kernels.lora_plans import GroupPlan
from peft_dist.kernels.lora_triton_parts import (
    EXPAND_RANKS,
    find_adapter,
    layer_of,
    load_b,
    pick,
)
from peft_dist.kernels.lora_triton_rows import row_part, row_sums
from peft_dist.kernels.lora_workspace import LoRAWorkspace
from peft_dist.kernels.triton_device import device_of
from peft_dist.kernels.types import KVCache, LoRALayerWeights, LoRAPlan

# Of a tile, by one program: with 16 a full tile takes twice as long, with fewer most programs have nothing to do.
ROWS = 8
# Of a step: with more, rows one after another are slower than products of matrices in a launch of their own.
MOST_ROWS = 256
# Of a thread: twelve programs of one warp fit a multiprocessor then, and those of 32 tiles run all at once on an H100.
REGISTERS = 168


@triton.jit
def _ask(
    y, y_stride, places, cos, cos_stride, sin, sin_stride, rows, i, length, source, is_adapted, turns, max_rank, c,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What row ``i`` of a tile needs, all of it asked for at once; nothing where there is no such row.

    ``c``: columns of half a head, of which ``y`` is the first; ``rows``: where the tile's row numbers are.
    """
    is_there = i < length
    row = tl.load(rows + i, mask=is_there, other=0).to(tl.int64)
    place = tl.load(places + row, mask=is_there, other=-1).to(tl.int64)
    mask = is_there & (c < HEAD_DIM // 2)
    a = tl.load(y + row * y_stride + c, mask=mask, other=0.0)
    b = tl.load(y + row * y_stride + HEAD_DIM // 2 + c, mask=mask, other=0.0)
    mask = mask & turns
    cos_a = tl.load(cos + row * cos_stride + c, mask=mask, other=0.0)
    sin_a = tl.load(sin + row * sin_stride + c, mask=mask, other=0.0)
    cos_b = tl.load(cos + row * cos_stride + HEAD_DIM // 2 + c, mask=mask, other=0.0)
    sin_b = tl.load(sin + row * sin_stride + HEAD_DIM // 2 + c, mask=mask, other=0.0)
    h = row_sums(source + i * max_rank, is_there & is_adapted, max_rank, 0, TILE, SPLIT)
    return row, place, a, b, cos_a, sin_a, cos_b, sin_b, h


@triton.jit(
    do_not_specialize=[
        *("table0", "table1", "table2", "slots0", "slots1", "slots2", "columns0", "columns1", "columns2"),
    ]
)
def rotary_expand_kernel(
    query,
    key,
    value,
    cos,
    sin,
    places,
    out,
    key_cache,
    value_cache,
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
    cos_stride,
    sin_stride,
    block_size,
    key_cache_block,
    key_cache_slot,
    key_cache_head,
    value_cache_block,
    value_cache_slot,
    value_cache_head,
    max_rank,
    Y_STRIDE0: tl.constexpr,
    Y_STRIDE1: tl.constexpr,
    Y_STRIDE2: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PLACE1: tl.constexpr,
    PLACE2: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    BY_TILE: tl.constexpr,
):
    """Program (head, tile, some of its rows): heads of the query first, then the keys', then the values', which do not
    turn.

    GROUP: layers of the shrink, of which keys and values are PLACE1 and PLACE2 (queries: 0); those that it lacked have
    no slots here, and any place. HALF: a power of two, at least half of HEAD_DIM.
    """
    tile = tl.program_id(1)
    i = tl.program_id(2) * ROWS
    length = tl.load(tile_lens + tile)
    slot = tl.load(tile_slots + tile)
    if not BY_TILE:  # noqa: SIM102
        if length <= i:
            return
    end = tl.minimum(length, i + ROWS)
    layer, head = layer_of(tl.program_id(0), NUM_HEADS, NUM_KV_HEADS, 3)
    width = pick(layer, NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS, 3) * HEAD_DIM
    B = pick(layer, B0, B1, B2, 3)
    columns = pick(layer, columns0, columns1, columns2, 3)
    slots = pick(layer, slots0, slots1, slots2, 3)
    pages, rank, page = find_adapter(
        pick(layer, pages0, pages1, pages2, 3),
        pick(layer, ranks0, ranks1, ranks2, 3),
        pick(layer, table0, table1, table2, 3),
        slots,
        columns,
        tile if BY_TILE else slot,
        1 if BY_TILE else length,
        PAGE,
    )
    if length <= i:
        return
    c = tl.arange(0, HALF)
    rows = tile_rows + tile * TILE
    y = pick(layer, query, key, value, 3) + head * HEAD_DIM
    y_stride = pick(layer, Y_STRIDE0, Y_STRIDE1, Y_STRIDE2, 3)
    source = partials + (tile * GROUP + pick(layer, 0, PLACE1, PLACE2, 3)).to(tl.int64) * SPLIT * TILE * max_rank
    # Asked for before the rank is known: what there is of rank 0 is not the row's.
    is_adapted = (slot >= 0) & (slots > 0) if BY_TILE else (slot >= 0) & (slot < slots)
    turns = layer < 2
    row, place, a, b, cos_a, sin_a, cos_b, sin_b, h = _ask(
        y, y_stride, places, cos, cos_stride, sin, sin_stride, rows, i, end, source, is_adapted, turns, max_rank, c,
        HEAD_DIM, TILE, SPLIT,
    )  # fmt: skip
    r = tl.arange(0, EXPAND_RANKS)
    n = head * HEAD_DIM + c
    b_a = load_b(B, page, r, rank, n, width, PAGE)
    b_b = load_b(B, page, r, rank, n + HEAD_DIM // 2, width, PAGE)
    target = pick(layer, out, key_cache, value_cache, 3) + head * pick(
        layer, HEAD_DIM, key_cache_head, value_cache_head, 3
    )
    block_stride = pick(layer, 0, key_cache_block, value_cache_block, 3).to(tl.int64)
    slot_stride = pick(layer, 0, key_cache_slot, value_cache_slot, 3).to(tl.int64)
    while i < end:
        # What the next row needs is asked for before this one's is waited for.
        next_row, next_place, next_a, next_b, next_cos_a, next_sin_a, next_cos_b, next_sin_b, next_h = _ask(
            y, y_stride, places, cos, cos_stride, sin, sin_stride, rows, i + 1, end, source, is_adapted, turns,
            max_rank, c, HEAD_DIM, TILE, SPLIT,
        )  # fmt: skip
        h = tl.where(r < rank, h, 0.0)
        of_row = source + i * max_rank
        wide_a = a.to(tl.float32) + row_part(
            h, b_a, of_row, B, pages, columns, rank, n, width, max_rank, PAGE, TILE, SPLIT
        )
        wide_b = b.to(tl.float32) + row_part(
            h, b_b, of_row, B, pages, columns, rank, n + HEAD_DIM // 2, width, max_rank, PAGE, TILE, SPLIT
        )
        # Values are taken as they are, infinities too.
        turned_a = tl.where(turns, wide_a * cos_a.to(tl.float32) - wide_b * sin_a.to(tl.float32), wide_a)
        turned_b = tl.where(turns, wide_b * cos_b.to(tl.float32) + wide_a * sin_b.to(tl.float32), wide_b)
        in_cache = place // block_size * block_stride + place % block_size * slot_stride
        here = target + tl.where(layer == 0, row * (NUM_HEADS * HEAD_DIM), in_cache) + c
        mask = (c < HEAD_DIM // 2) & ((layer == 0) | (place >= 0))
        tl.store(here, turned_a.to(out.dtype.element_ty), mask=mask)
        tl.store(here + HEAD_DIM // 2, turned_b.to(out.dtype.element_ty), mask=mask)
        row, place, a, b, h = next_row, next_place, next_a, next_b, next_h
        cos_a, sin_a, cos_b, sin_b = next_cos_a, next_sin_a, next_cos_b, next_sin_b
        i += 1


def takes_rotary(
    rows: torch.Tensor, weights: Sequence[LoRALayerWeights], plan: LoRAPlan, cache: KVCache, head_dim: int
) -> bool:
    """Whether ``lora_expand_rotary`` is how to run these layers: in captured steps, where it can and the plan says so.

    Args:
        rows: What the layers read.
        weights: Of those that are adapted.
        head_dim: Of queries and keys.
    """
    tiles = tiles_of(plan, rows.device)
    group = group_of(weights)
    fits = cache.value.shape[3] == cache.key.shape[3] == head_dim and head_dim % 2 == 0
    same = rows.dtype == cache.key.dtype == cache.value.dtype
    if not (fits and same and tiles.has_base and tiles.is_static and tiles.tile_rows == 16):
        return False
    return plan.num_rows <= MOST_ROWS and group.plan(tiles, is_wide(group.dtype)).joins_rotary


def lora_expand_rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cache: KVCache,
    slot_mapping: torch.Tensor,
    weights: Sequence[LoRALayerWeights | None],
    plan: LoRAPlan,
    workspace: LoRAWorkspace | None = None,
    *,
    launch: GroupPlan | None = None,
) -> torch.Tensor:
    """``glue.Glue.rotary_and_write`` of all rows in tiles, the base's too, with the adapters' parts added before.

    ``lora_shrink_group`` has to have run for these weights, plan and workspace.

    Args:
        query, key, value: As ``Glue.rotary_and_write`` takes them, of one head size, ``[T, heads, D]``: the base's
            outputs. They may be columns of one tensor.
        cos, sin: ``[T, D]``.
        cache, slot_mapping: As there; of query's dtype.
        weights: Of the three layers; None for one that nobody adapts.
        plan: With tiles that hold the base's rows (``has_base``).
        workspace, launch: As in ``lora_triton.lora_expand_group_``.

    Returns:
        The rotated queries, contiguous. Rows in no tile (padding) hold anything, and write nothing.

    Raises:
        ValueError: the tensors do not fit, or the plan's tiles lack the base's rows.
    """
    resident = [w for w in weights if w is not None]
    if len(weights) != 3 or not resident:
        raise ValueError("a fused rotary embedding takes the weights of three layers, one of which has adapters")
    group = group_of(resident)
    tiles = tiles_of(plan, query.device)
    if not tiles.has_base:
        raise ValueError("a fused rotary embedding needs tiles of all rows: make them with has_base=True")
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    if not cos.shape[1] == sin.shape[1] == value.shape[2] == key.shape[2] == head_dim or value.shape[1] != num_kv_heads:
        raise ValueError(
            f"heads of {list(query.shape)}, {list(key.shape)}, {list(value.shape)} do not all turn by {list(cos.shape)}"
        )
    widths = num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim
    if any(w is not None and w.B.shape[1] != width for w, width in zip(weights, widths, strict=True)):
        raise ValueError(f"LoRA: the weights of three layers do not fit their outputs {widths}")
    ys = [
        even_rows("y", tensor.flatten(1), plan.num_rows, width)
        for tensor, width in zip((query, key, value), widths, strict=True)
    ]
    workspace = workspace or group.workspace()
    launch = group.plan(tiles, is_wide(group.dtype), launch)
    lookup = lookup_of(plan, tiles, resident, workspace.max_rank)
    out = query.new_empty(num_rows, num_heads, head_dim)
    with device_of(query):
        rotary_expand_kernel[(num_heads + 2 * num_kv_heads, tiles.max_tiles, tiles.tile_rows // ROWS)](
            *ys, cos, sin, slot_mapping, out, *cache, workspace.take(0), tiles.rows, tiles.slots, tiles.lens,
            *chain(*(expand_tables(w, resident[0], lookup) for w in weights)),
            cos.stride(0), sin.stride(0), cache.key.shape[1], *cache.key.stride()[:3],
            *cache.value.stride()[:3], workspace.max_rank,
            **{f"Y_STRIDE{i}": y.stride(0) for i, y in enumerate(ys)},
            NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
            HALF=triton.next_power_of_2(head_dim // 2),
            PLACE1=int(weights[0] is not None), PLACE2=sum(w is not None for w in weights[:2]) % group.size,
            PAGE=group.page_rows, GROUP=group.size, TILE=tiles.tile_rows, SPLIT=launch.split, ROWS=ROWS,
            BY_TILE=lookup is not None,
            num_warps=launch.rotary_warps, **({"maxnreg": REGISTERS} if launch.rotary_warps == 1 else {}),
        )  # fmt: skip
    return out
