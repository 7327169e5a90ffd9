"""The expand of a gated MLP's two layers, and its activation, in one pass over their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from peft_dist.kernels.lora_gate_loop import gate_loop_kernel
from peft_dist.kernels.lora_group import even_rows, group_of, is_wide, tiles_of, watched_tile
from peft_dist.kernels.lora_lookup_triton import Lookup, lookup_of, ranks_of
from peft_dist.kernels.lora_plans import GroupPlan
from peft_dist.kernels.lora_tables import layer_tables
from peft_dist.kernels.lora_triton_parts import EXPAND_RANKS, expand_part, find_adapter, gated, load_b
from peft_dist.kernels.lora_triton_rows import ask_row, row_part, takes_rows
from peft_dist.kernels.lora_workspace import LoRAWorkspace
from peft_dist.kernels.triton_device import device_of
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan


@triton.jit(do_not_specialize=["gate_table", "gate_slots", "gate_columns", "up_table", "up_slots", "up_columns"])
def _gate_kernel(
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
    FEW: tl.constexpr,
    WIDE: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr,
    BY_TILE: tl.constexpr,
):
    """Program (part of the columns, tile). GROUP: layers of the shrink; the one that it lacked has no slots here.

    As in ``expand_kernel`` a tile of up to FEW rows takes ``BLOCK_N`` columns a program, and others ``PART_N``. Tiles
    of the base are like those of an adapter of rank 0.
    """
    block = tl.program_id(0)
    tile = tl.program_id(1)
    m = tl.arange(0, TILE)
    length = tl.load(tile_lens + tile)
    slot = tl.load(tile_slots + tile)
    row = tl.load(tile_rows + tile * TILE + m).to(tl.int64)
    is_within = block % (BLOCK_N // PART_N) != 0
    if not (PDL or BY_TILE):  # noqa: SIM102
        if (length == 0) | ((length == 1) & is_within):
            return
    if BY_TILE:
        slot, live = tile, 1
    else:
        live = length
    gate_pages, gate_rank, gate_page = find_adapter(
        gate_pages, gate_ranks, gate_table, gate_slots, gate_columns, slot, live, PAGE
    )
    up_pages, up_rank, up_page = find_adapter(up_pages, up_ranks, up_table, up_slots, up_columns, slot, live, PAGE)
    r = tl.arange(0, EXPAND_RANKS)
    n = block * PART_N + tl.arange(0, BLOCK_N)
    is_few = takes_rows(length, tl.maximum(gate_rank, up_rank), FEW)
    is_idle = (length == 0) | (is_few & is_within)
    width = tl.where(is_few & (not is_idle), N, 0)
    gate_b = load_b(gate_B, gate_page, r, gate_rank, n, width, PAGE)
    up_b = load_b(up_B, up_page, r, up_rank, n, width, PAGE)
    if PDL:
        # As in expand_kernel: on no way out is it left out.
        gdc_launch_dependents()
        gdc_wait()
    if is_idle:
        return
    gate_source = partials + (tile * GROUP).to(tl.int64) * SPLIT * TILE * max_rank
    up_source = gate_source + (GROUP - 1) * SPLIT * TILE * max_rank
    if is_few:
        rows = tile_rows + tile * TILE
        at, x, gate_h = ask_row(
            gate, GATE_STRIDE, rows, 0, length, gate_source, gate_rank, n, N, max_rank, TILE, SPLIT
        )  # fmt: skip
        _, factor, up_h = ask_row(up, UP_STRIDE, rows, 0, length, up_source, up_rank, n, N, max_rank, TILE, SPLIT)
        i = 0
        while i < length:
            # As in add_rows.
            next_at, next_x, next_gate_h = ask_row(
                gate, GATE_STRIDE, rows, i + 1, length, gate_source, gate_rank, n, N, max_rank, TILE, SPLIT
            )
            _, next_factor, next_up_h = ask_row(
                up, UP_STRIDE, rows, i + 1, length, up_source, up_rank, n, N, max_rank, TILE, SPLIT
            )
            gate_part = row_part(
                gate_h, gate_b, gate_source + i * max_rank, gate_B, gate_pages, gate_columns, gate_rank, n, N, max_rank,
                PAGE, TILE, SPLIT,
            )  # fmt: skip
            up_part = row_part(
                up_h, up_b, up_source + i * max_rank, up_B, up_pages, up_columns, up_rank, n, N, max_rank,
                PAGE, TILE, SPLIT,
            )  # fmt: skip
            value = gated(x.to(tl.float32) + gate_part, factor.to(tl.float32) + up_part, SILU)
            tl.store(out + at * OUT_STRIDE + n, value.to(out.dtype.element_ty), mask=n < N)
            at, x, gate_h, factor, up_h = next_at, next_x, next_gate_h, next_factor, next_up_h
            i += 1
        return
    part = block * PART_N + tl.arange(0, PART_N)
    is_row = m < length
    mask = is_row[:, None] & (part < N)[None, :]
    gate_first = load_b(gate_B, gate_page, r, gate_rank, part, N, PAGE)
    up_first = load_b(up_B, up_page, r, up_rank, part, N, PAGE)
    wide_x = tl.load(gate + row[:, None] * GATE_STRIDE + part[None, :], mask=mask, other=0.0).to(tl.float32)
    wide_factor = tl.load(up + row[:, None] * UP_STRIDE + part[None, :], mask=mask, other=0.0).to(tl.float32)
    wide_x += expand_part(
        gate_source + m[:, None] * max_rank, gate_B, gate_first, gate_pages, gate_columns, gate_rank,
        is_row, part, N, max_rank, PAGE, TILE, SPLIT, PART_N, WIDE,
    )  # fmt: skip
    wide_factor += expand_part(
        up_source + m[:, None] * max_rank, up_B, up_first, up_pages, up_columns, up_rank,
        is_row, part, N, max_rank, PAGE, TILE, SPLIT, PART_N, WIDE,
    )  # fmt: skip
    here = out + row[:, None] * OUT_STRIDE + part[None, :]
    tl.store(here, gated(wide_x, wide_factor, SILU).to(out.dtype.element_ty), mask=mask)


def lora_expand_gate(
    gate: torch.Tensor,
    up: torch.Tensor,
    weights: Sequence[LoRALayerWeights | None],
    plan: LoRAPlan,
    activation: str = "silu",
    out: torch.Tensor | None = None,
    workspace: LoRAWorkspace | None = None,
    *,
    is_next: bool = False,
    launch: GroupPlan | None = None,
) -> torch.Tensor:
    """``activation(gate + its part) * (up + its part)`` for all rows in tiles, those of the base too.

    Sums and the activation are float32; each element is rounded once. ``lora_shrink_group`` has to have run for these
    weights, plan and workspace.

    Args:
        gate, up: ``[..., N]``, R rows of one dtype, the base layers' outputs; they may be columns of one tensor.
        weights: Of the two layers; None for one that nobody adapts.
        plan: With tiles that hold the base's rows (``has_base``). Rows in no tile (padding) keep what ``out`` holds.
        activation: "silu" or "gelu_tanh".
        out: Contiguous, of gate's shape and dtype, none of the two; None makes one.
        workspace, is_next, launch: As in ``lora_expand_group_``.

    Raises:
        ValueError: the tensors do not fit, the plan's tiles lack the base's rows, or the activation is another.
    """
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"the activation of a fused gate is silu or gelu_tanh, not {activation!r}")
    resident = [w for w in weights if w is not None]
    if len(weights) != 2 or not resident:
        raise ValueError("a fused gate takes the weights of two layers, one of which at least has adapters")
    group = group_of(resident)
    tiles = tiles_of(plan, gate.device)
    if not tiles.has_base:
        raise ValueError("a fused gate needs tiles of all rows: make them with has_base=True")
    width = group.out_features[0]
    out = torch.empty_like(gate, memory_format=torch.contiguous_format) if out is None else out
    rows = [even_rows("y", tensor, plan.num_rows, width) for tensor in (gate, up, out)]
    workspace = workspace or group.workspace()
    wide = is_wide(group.dtype)
    lookup = lookup_of(plan, tiles, resident, workspace.max_rank)
    launch = group.plan(tiles, wide, launch, ranks_of(workspace, lookup))
    pdl = launch.pdl and is_next
    tensors = (
        *rows, workspace.take(0), tiles.rows, tiles.slots, tiles.lens, *_tables(weights[0], resident[0], lookup),
        *_tables(weights[1], resident[0], lookup),
    )  # fmt: skip
    known = {
        "N": width, "GATE_STRIDE": rows[0].stride(0), "UP_STRIDE": rows[1].stride(0), "OUT_STRIDE": rows[2].stride(0),
        "PAGE": group.page_rows, "GROUP": group.size, "TILE": tiles.tile_rows, "SPLIT": launch.split,
        "SILU": activation == "silu", "BY_TILE": lookup is not None, "num_warps": launch.gate_warps,
    }  # fmt: skip
    with device_of(gate):
        if launch.gate_loop_n:
            grid = tiles.max_tiles, 2 * -(-width // launch.gate_loop_n)
            gate_loop_kernel[grid](
                *tensors, watched_tile(tiles), workspace.max_rank, BLOCK_N=launch.gate_loop_n,
                PART_N=launch.loop_part // 2, STAGES=launch.loop_stages, RANKS=launch.ranks,
                SHARES=launch.gate_loop_shares, **known,
            )  # fmt: skip
            return out
        part_n = min(launch.gate_n, launch.gate_part_n)
        _gate_kernel[(-(-width // part_n), tiles.max_tiles)](
            *tensors, workspace.max_rank, BLOCK_N=launch.gate_n, PART_N=part_n, FEW=launch.few_rows, WIDE=wide,
            PDL=pdl, **known, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip
    return out


def _tables(weights: LoRALayerWeights | None, other: LoRALayerWeights, lookup: Lookup | None) -> tuple[Any, ...]:
    """A layer's arguments; one that nobody adapts gets the other's tables, with no slots."""
    named = other if weights is None else weights
    *tensors, stride, slots, columns = (layer_tables(named) if lookup is None else lookup.tables_of(named)).of_expand()
    return *tensors, stride, 0 if weights is None else slots, columns
