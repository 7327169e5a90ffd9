"""The expand of a gated MLP's two layers, and its activation, in one pass over their outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from peft_dist.kernels.lora_group import even_rows, group_of, is_wide, layer_tables, tiles_of
from peft_dist.kernels.lora_plans import GroupPlan
from peft_dist.kernels.lora_triton_parts import expand_part, find_adapter
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
    GATE: tl.constexpr,
    UP: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (block of columns, tile). GATE, UP: which of the GROUP layers of the shrink they were; -1: not there."""
    tile = tl.program_id(1)
    m = tl.arange(0, TILE)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    length = tl.load(tile_lens + tile)
    slot = tl.load(tile_slots + tile)
    row = tl.load(tile_rows + tile * TILE + m).to(tl.int64)
    if not PDL:  # noqa: SIM102
        if length == 0:
            return
    if GATE >= 0:
        gate_pages, gate_rank, gate_b = find_adapter(
            gate_B, gate_pages, gate_ranks, gate_table, gate_slots, gate_columns, slot, length, n, N, PAGE
        )
    if UP >= 0:
        up_pages, up_rank, up_b = find_adapter(
            up_B, up_pages, up_ranks, up_table, up_slots, up_columns, slot, length, n, N, PAGE
        )
    if PDL:
        # As in expand_kernel: on no way out is it left out.
        gdc_launch_dependents()
        gdc_wait()
    if length == 0:
        return
    is_row = m < length
    mask = is_row[:, None] & (n < N)[None, :]
    x = tl.load(gate + row[:, None] * GATE_STRIDE + n[None, :], mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(up + row[:, None] * UP_STRIDE + n[None, :], mask=mask, other=0.0).to(tl.float32)
    if GATE >= 0:
        source = partials + ((tile * GROUP + GATE).to(tl.int64) * SPLIT * TILE + m[:, None]) * max_rank
        x += expand_part(
            source, gate_B, gate_b, gate_pages, gate_columns, gate_rank, is_row, n, N, max_rank,
            PAGE, TILE, SPLIT, BLOCK_N, WIDE,
        )  # fmt: skip
    if UP >= 0:
        source = partials + ((tile * GROUP + UP).to(tl.int64) * SPLIT * TILE + m[:, None]) * max_rank
        factor += expand_part(
            source, up_B, up_b, up_pages, up_columns, up_rank, is_row, n, N, max_rank,
            PAGE, TILE, SPLIT, BLOCK_N, WIDE,
        )  # fmt: skip
    if SILU:
        active = x * tl.sigmoid(x)
    else:
        # x / 2 * (1 + tanh(u)) with tanh(u) = 2 * sigmoid(2 * u) - 1 and u = sqrt(2 / pi) * (x + 0.044715 * x ** 3)
        active = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    here = out + row[:, None] * OUT_STRIDE + n[None, :]
    tl.store(here, (active * factor).to(out.dtype.element_ty), mask=mask)


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
    launch = group.plan(tiles, wide, launch)
    pdl = launch.pdl and is_next
    gate_part, up_part = (layer_tables(w or resident[0]).of_expand() for w in weights)
    with device_of(gate):
        _gate_kernel[(-(-width // launch.gate_n), tiles.max_tiles)](
            *rows,
            workspace.take(0),
            tiles.rows,
            tiles.slots,
            tiles.lens,
            *gate_part,
            *up_part,
            workspace.max_rank,
            N=width,
            GATE_STRIDE=rows[0].stride(0),
            UP_STRIDE=rows[1].stride(0),
            OUT_STRIDE=rows[2].stride(0),
            PAGE=group.page_rows,
            GROUP=group.size,
            GATE=-1 if weights[0] is None else 0,
            UP=-1 if weights[1] is None else group.size - 1,
            TILE=tiles.tile_rows,
            SPLIT=launch.split,
            BLOCK_N=launch.gate_n,
            WIDE=wide,
            SILU=activation == "silu",
            PDL=pdl,
            num_warps=launch.gate_warps,
            **({"launch_pdl": True} if pdl else {}),
        )
    return out
