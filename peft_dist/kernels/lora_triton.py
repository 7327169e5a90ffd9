"""LoRA through Triton kernels: one shrink and one expand for the layers that read one input.

Nothing on the host decides what the kernels read, and nothing waits for the device, so that a call can be captured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from peft_dist.kernels.lora_expand_loop import expand_loop_kernel
from peft_dist.kernels.lora_group import MOST_LAYERS, even_rows, group_of, is_wide, three, tiles_of, watched_tile
from peft_dist.kernels.lora_lookup_triton import lookup_of, ranks_of
from peft_dist.kernels.lora_plans import GroupPlan
from peft_dist.kernels.lora_triton_kernels import expand_kernel, shrink_kernel
from peft_dist.kernels.lora_workspace import LoRAWorkspace
from peft_dist.kernels.triton_device import device_of
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan

_KINDS = (torch.float32, torch.bfloat16, torch.float16)


def add_lora_group_(
    ys: Sequence[torch.Tensor], x: torch.Tensor, weights: Sequence[LoRALayerWeights], plan: LoRAPlan
) -> bool:
    """Triton back end of ``lora.add_lora_group_``; False when there is no kernel for this call and nothing was done."""
    if any(tensor.dtype not in _KINDS for tensor in (x, *ys)):
        return False
    for members in _alike(ys, weights):
        some = [weights[i] for i in members]
        lora_shrink_group(x, some, plan)
        lora_expand_group_([ys[i] for i in members], some, plan, is_next=True)
    return True


def is_one_launch(x: torch.Tensor, weights: Sequence[LoRALayerWeights]) -> bool:
    """Whether layers that read x, and whose outputs have one dtype, are one shrink and one expand."""
    return x.dtype in _KINDS and len(list(_alike([x] * len(weights), weights))) == 1


def lora_shrink_group(
    x: torch.Tensor,
    weights: Sequence[LoRALayerWeights | None],
    plan: LoRAPlan,
    workspace: LoRAWorkspace | None = None,
    *,
    launch: GroupPlan | None = None,
) -> None:
    """The rank intermediates of up to three layers that read x, scaled, left in the workspace for the expand.

    It may run on another stream than the layers' own products; the expand, and whatever uses the workspace next, has to
    wait for it.

    Args:
        x: ``[..., in_features]``, R rows, float32, bfloat16 or float16.
        weights: Of the layers, whose adapters have one dtype; None where there are none.
        workspace: None takes that of the weights' pool.
        launch: None takes the best that is known (``lora_plans``); the expand needs the same.

    Raises:
        ValueError: x does not fit the layers or the plan.
    """
    resident = [w for w in weights if w is not None]
    if not resident:
        return
    group = group_of(resident)
    tiles = tiles_of(plan, x.device)
    rows = even_rows("x", x, plan.num_rows, group.in_features)
    workspace = workspace or group.workspace()
    wide = is_wide(x.dtype, group.dtype)
    lookup = lookup_of(plan, tiles, resident, workspace.max_rank)
    launch = group.plan(tiles, wide, launch, ranks_of(workspace, lookup))
    partials = workspace.take(tiles.added * group.size * launch.split * tiles.tile_rows * workspace.max_rank)
    with device_of(x):
        shrink_kernel[(group.size * launch.split * launch.rank_parts, tiles.added)](
            rows,
            partials,
            tiles.rows,
            tiles.slots,
            tiles.lens,
            *group.arguments(lookup).shrink,
            float(plan.factor),
            workspace.max_rank,
            K=group.in_features,
            X_STRIDE=rows.stride(0),
            PAGE=group.page_rows,
            GROUP=group.size,
            TILE=tiles.tile_rows,
            SPLIT=launch.split,
            BLOCK_K=launch.block_k,
            BLOCK_R=min(launch.shrink_r, workspace.max_rank),
            WIDE=wide,
            PDL=False,
            BY_TILE=lookup is not None,
            RANK_PARTS=launch.rank_parts,
            num_warps=launch.shrink_warps,
            num_stages=launch.shrink_stages,
        )


def lora_expand_group_(
    ys: Sequence[torch.Tensor],
    weights: Sequence[LoRALayerWeights | None],
    plan: LoRAPlan,
    workspace: LoRAWorkspace | None = None,
    *,
    is_next: bool = False,
    adds: bool = True,
    launch: GroupPlan | None = None,
) -> None:
    """Add the layers' parts, whose intermediates ``lora_shrink_group`` left in the workspace, to their outputs.

    Args:
        ys: ``[..., out_features]`` of each layer, R rows, all of one dtype; they may be columns of one wider tensor.
        weights, plan, workspace, launch: As in ``lora_shrink_group``.
        is_next: The shrink is what was queued last on this stream, so that the expand may be launched while it runs.
        adds: False: the outputs become the parts, whatever they held; 0 in the base's rows. The plan's tiles hold those
            too then (``has_base``); rows in no tile (padding) keep what they hold.

    Raises:
        ValueError: an output does not fit its layer or the plan, or the plan's tiles lack the base's rows.
    """
    resident = [w for w in weights if w is not None]
    if not resident:
        return
    group = group_of(resident)
    tiles = tiles_of(plan, ys[0].device)
    if not (adds or tiles.has_base):
        raise ValueError("parts alone need tiles of all rows: make them with has_base=True")
    num_tiles = tiles.added if adds else tiles.max_tiles
    widths = group.out_features
    adapted = [y for y, w in zip(ys, weights, strict=True) if w is not None]
    rows = [even_rows("y", y, plan.num_rows, n) for y, n in zip(adapted, widths, strict=True)]
    workspace = workspace or group.workspace()
    wide = is_wide(group.dtype)
    lookup = lookup_of(plan, tiles, resident, workspace.max_rank)
    launch = group.plan(tiles, wide, launch, ranks_of(workspace, lookup))
    partials = workspace.take(0)
    padded = three(rows)
    tensors = *padded, partials, tiles.rows, tiles.slots, tiles.lens, *group.arguments(lookup).expand
    n, strides = three(widths), [y.stride(0) for y in padded]
    known = {
        "PAGE": group.page_rows, "GROUP": group.size, "TILE": tiles.tile_rows, "SPLIT": launch.split,
        "BY_TILE": lookup is not None, "ADDS": adds, "num_warps": launch.expand_warps,
        **{f"N{i}": n[i] for i in range(3)}, **{f"Y_STRIDE{i}": strides[i] for i in range(3)},
    }  # fmt: skip
    with device_of(ys[0]):
        if launch.loop_n:
            grid = num_tiles, 2 * sum(-(-n // launch.loop_n) for n in widths)
            expand_loop_kernel[grid](
                *tensors, watched_tile(tiles), workspace.max_rank, BLOCK_N=launch.loop_n, PART_N=launch.loop_part,
                STAGES=launch.loop_stages, RANKS=launch.ranks, SHARES=launch.loop_shares, **known,
            )  # fmt: skip
            return
        pdl = launch.pdl and is_next
        part_n = min(launch.block_n, launch.part_n)
        expand_kernel[(sum(-(-n // part_n) for n in widths), num_tiles)](
            *tensors, workspace.max_rank, BLOCK_N=launch.block_n, PART_N=part_n, FEW=launch.few_rows, WIDE=wide,
            PDL=pdl, **known, **({"launch_pdl": True} if pdl else {}),
        )  # fmt: skip


def _alike(ys: Sequence[torch.Tensor], weights: Sequence[LoRALayerWeights]) -> Iterator[Sequence[int]]:
    """Members that one launch takes, by index: neighbours of the same types."""
    members: list[int] = []
    for i, (y, w) in enumerate(zip(ys, weights, strict=True)):
        if members:
            first = members[0]
            same = (y.dtype, w.A.dtype, w.page_rows) == (
                ys[first].dtype,
                weights[first].A.dtype,
                weights[first].page_rows,
            )
            if not same or len(members) == MOST_LAYERS:
                yield members
                members = []
        members.append(i)
    yield members
