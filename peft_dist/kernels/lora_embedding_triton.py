"""LoRA of an embedding on a GPU: the rank intermediate is looked up, not computed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from peft_dist.kernels.lora_group import even_rows, is_wide, tiles_of
from peft_dist.kernels.lora_tables import layer_tables
from peft_dist.kernels.lora_triton_parts import EXPAND_RANKS, load_b, load_pages, multiply_intermediate
from peft_dist.kernels.triton_device import device_of
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan

_KINDS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(do_not_specialize=["table", "slots", "columns"])
def _embedding_kernel(
    y,
    ids,
    tile_rows,
    tile_slots,
    tile_lens,
    A,
    B,
    pages,
    ranks,
    scalings,
    table,
    slots,
    columns,
    factor,
    V: tl.constexpr,
    N: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Program (block of columns, tile)."""
    tile = tl.program_id(1)
    length = tl.load(tile_lens + tile)
    slot = tl.load(tile_slots + tile)
    if (length == 0) | (slot < 0):
        return
    is_known = (slot >= 0) & (slot < slots)
    slot = tl.where(is_known, slot, 0)
    rank = tl.load(ranks + slot * table, mask=is_known, other=0)
    if rank == 0:
        return
    scaling = tl.load(scalings + slot * table) * factor
    m = tl.arange(0, TILE)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = m < length
    row = tl.load(tile_rows + tile * TILE + m, mask=is_row, other=0).to(tl.int64)
    token = tl.load(ids + row, mask=is_row, other=0).to(tl.int64)
    here = y + row[:, None] * Y_STRIDE + n[None, :]
    mask = is_row[:, None] & (n < N)[None, :]
    before = tl.load(here, mask=mask, other=0.0)
    acc = tl.zeros((TILE, BLOCK_N), tl.float32)
    first = 0
    while first < rank:
        r = first + tl.arange(0, EXPAND_RANKS)
        page = load_pages(pages + slot * table, r, columns, PAGE)
        a_row = (page * PAGE + r % PAGE).to(tl.int64) * V
        a = tl.load(A + a_row[None, :] + token[:, None], mask=is_row[:, None] & (r < rank)[None, :], other=0.0)
        b = load_b(B, page, r, rank, n, N, PAGE)
        acc = multiply_intermediate(a.to(tl.float32) * scaling, b, acc, WIDE)
        first += EXPAND_RANKS
    tl.store(here, (before.to(tl.float32) + acc).to(before.dtype), mask=mask)


def add_embedding_lora_(
    y: torch.Tensor, ids: torch.Tensor, weights: LoRALayerWeights, plan: LoRAPlan, factor: float
) -> bool:
    """Triton back end of ``lora.add_embedding_lora_``; False when there is no kernel for this call.

    Raises:
        ValueError: y or ids do not fit the weights or the plan.
    """
    if y.dtype not in _KINDS:
        return False
    layer = layer_tables(weights)
    num_embeddings, width = layer.A.shape[1], layer.B.shape[1]
    rows = even_rows("y", y, plan.num_rows, width)
    if ids.shape != (plan.num_rows,):
        raise ValueError(f"LoRA: the plan has {plan.num_rows} rows, ids {list(ids.shape)}")
    tiles = tiles_of(plan, y.device)
    wide = is_wide(layer.B.dtype)
    block = 32 if wide else 64 if tiles.tile_rows > 32 else 128
    with device_of(y):
        _embedding_kernel[(-(-width // block), tiles.added)](
            rows,
            ids.contiguous(),
            tiles.rows,
            tiles.slots,
            tiles.lens,
            layer.A,
            layer.B,
            layer.pages,
            layer.rank,
            layer.scaling,
            *layer.sizes(),
            plan.factor * factor,
            V=num_embeddings,
            N=width,
            Y_STRIDE=rows.stride(0),
            PAGE=weights.page_rows,
            TILE=tiles.tile_rows,
            BLOCK_N=block,
            WIDE=wide,
            num_warps=8 if wide else 4,
        )
    return True
