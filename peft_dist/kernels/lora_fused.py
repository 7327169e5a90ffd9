"""Linear layers of decode steps with their adapters in one launch: the product, the shrink and the expand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from peft_dist.kernels.lora_fused_kernel import fused_kernel
from peft_dist.kernels.lora_fused_plans import FusedPlan
from peft_dist.kernels.lora_group import even_rows, group_of, three, tiles_of
from peft_dist.kernels.lora_lookup_triton import MOST_ROWS, lookup_of
from peft_dist.kernels.lora_workspace import LoRAWorkspace
from peft_dist.kernels.triton_device import device_of
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan

_HALF = (torch.bfloat16, torch.float16)
_ALIGNED, _TILE_ROWS = 16, 16
# Of tiles that a kernel has room for: fewer would only be further kernels to compile.
_FEWEST = 16


def can_multiply(x: torch.Tensor, weight: torch.Tensor, widths: Sequence[int], launch: FusedPlan) -> bool:
    """Whether ``plain_linear`` takes this call: of half precision, a weight that lies evenly, sizes that fit."""
    if x.dtype != weight.dtype or x.dtype not in _HALF or x.numel() > MOST_ROWS * x.shape[-1]:
        return False
    if not weight.is_contiguous() or weight.data_ptr() % _ALIGNED or sum(widths) != len(weight):
        return False
    fits = all(width % launch.block_n == 0 for width in widths)
    return fits and weight.shape[1] % (launch.split * launch.block_k) == 0


def can_fuse(
    x: torch.Tensor, weight: torch.Tensor, resident: Sequence[LoRALayerWeights], plan: LoRAPlan, launch: FusedPlan
) -> bool:
    """Whether ``fused_linear`` takes this call: ``can_multiply``, and tables that were looked up for the pass."""
    workspace, tiles = resident[0].workspace, plan.tiles
    if tiles is None or tiles.tile_rows != _TILE_ROWS or workspace is None:
        return False
    if not can_multiply(x, weight, [w.B.shape[1] for w in resident], launch):
        return False
    if any(w.A.dtype != x.dtype or w.page_rows != resident[0].page_rows for w in resident):
        return False
    lookup = lookup_of(plan, tiles, resident, workspace.max_rank)
    return lookup is not None and lookup.places[id(resident[0])] not in lookup.taken


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weights: Sequence[LoRALayerWeights],
    plan: LoRAPlan,
    *,
    launch: FusedPlan,
    activation: str | None = None,
) -> torch.Tensor:
    """``x @ weight.T``, and ``add_lora_group_`` to the columns of each layer, each element rounded once.

    Args:
        x: ``[..., in_features]``, R rows, bfloat16 or float16; R is at most ``MOST_ROWS``.
        weight: ``[sum of out_features, in_features]`` of up to three layers, whose rows follow each other.
        weights: Their adapters, for which ``can_fuse`` holds.
        plan: Of the pass, in which these layers are called once.
        activation: "silu" or "gelu_tanh": of two layers of one width ``activation(first) * second`` is wanted.

    Raises:
        ValueError: x does not fit the layers or the plan, or the pass has called these layers before.
    """
    group, tiles = group_of(weights), tiles_of(plan, x.device)
    rows = even_rows("x", x, plan.num_rows, group.in_features)
    workspace = group.workspace()
    lookup = lookup_of(plan, tiles, weights, workspace.max_rank)
    counter = None if lookup is None else lookup.take_counter(weights[0])
    if lookup is None or counter is None:
        raise ValueError("a fused linear needs tables that were looked up for the pass, and runs once in it")
    count, rank = tiles.added, workspace.max_rank
    parts = group.size * count * launch.shrink_split * tiles.tile_rows * rank if launch.shrink_split > 1 else 0
    # Two halves of each number of the intermediate are as long as a float32.
    sizes = [_sums(len(rows), len(weight), launch), parts, group.size * len(rows) * rank]
    sums, partials, hidden = _pieces(workspace, sizes)
    widths = three(group.out_features)
    adapters = (
        partials, hidden.view(x.dtype), lookup.ready[counter:], tiles.rows, tiles.lens, lookup.row_tiles,
        lookup.entries, *three([w.A for w in weights]), *three([w.B for w in weights]),
        *three([lookup.places[id(w)] for w in weights]), float(plan.factor), rank, count,
    )  # fmt: skip
    known = {
        **{f"N{i}": width for i, width in enumerate(widths)},
        "PAGE": group.page_rows, "GROUP": group.size, "TILE": tiles.tile_rows,
        "COLUMNS": lookup.entries.shape[2], "ROOM": max(_FEWEST, triton.next_power_of_2(count)),
    }  # fmt: skip
    return _launch(x, rows, weight, sums, workspace, adapters, known, launch, activation)


def plain_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    workspace: LoRAWorkspace,
    *,
    launch: FusedPlan,
    activation: str | None = None,
) -> torch.Tensor:
    """``x @ weight.T`` by the same kernel, without adapters: what the fused form costs at least."""
    rows = even_rows("x", x, x.numel() // x.shape[-1], weight.shape[1])
    [sums] = _pieces(workspace, [_sums(len(rows), len(weight), launch)])
    half = len(weight) // 2
    known = {"N0": half, "N1": half, "N2": 0, "GROUP": 0, "PAGE": 8, "TILE": _TILE_ROWS, "COLUMNS": 2, "ROOM": _FEWEST}
    adapters = (sums, rows, *[workspace.take_counters(1)] * 5, *[rows] * 6, 0, 0, 0, 1.0, 16, 0)
    return _launch(x, rows, weight, sums, workspace, adapters, known, launch, activation)


def _launch(
    x: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    workspace: LoRAWorkspace,
    adapters: tuple[Any, ...],
    known: dict[str, int],
    launch: FusedPlan,
    activation: str | None,
) -> torch.Tensor:
    N, K = weight.shape
    if activation is not None:
        N //= 2
        launch = replace(launch, split=1)
    if N % launch.block_n or K % (launch.split * launch.block_k):
        raise ValueError(f"a fused linear of {N} outputs and {K} inputs cannot be launched by {launch}")
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    blocks, tiles = N // launch.block_n, known["GROUP"] * adapters[-1]
    source = TensorDescriptor.from_tensor(weight, [launch.block_n, launch.block_k]) if launch.tma else weight
    with device_of(x):
        fused_kernel[(tiles * launch.shrink_split + blocks * launch.split,)](
            rows, source, y, sums, workspace.take_counters(tiles + blocks), len(rows), rows.stride(0), K, N,
            *adapters, **known,
            SHRINK_SPLIT=launch.shrink_split, SHRINK_K=launch.shrink_k, SHRINK_STAGES=launch.shrink_stages,
            EACH=launch.each, AHEAD=launch.ahead, EXPAND_STAGES=launch.expand_stages, BLOCK_M=_room(len(rows)),
            BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, SPLIT=launch.split, STAGES=launch.stages,
            TMA=launch.tma, GATED=activation is not None, SILU=activation == "silu", num_warps=launch.warps,
        )  # fmt: skip
    return y


def _room(num_rows: int) -> int:
    return max(16, triton.next_power_of_2(num_rows))


def _sums(num_rows: int, outputs: int, launch: FusedPlan) -> int:
    """Numbers that the parts of the product leave."""
    return outputs * launch.split * _room(num_rows) if launch.split > 1 else 0


def _pieces(workspace: LoRAWorkspace, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Neighbours in the workspace, each at a multiple of 256 bytes."""
    sizes = [-(-max(size, 1) // 64) * 64 for size in sizes]
    return list(workspace.take(sum(sizes))[: sum(sizes)].split(sizes))
