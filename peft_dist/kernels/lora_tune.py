"""Searches launch plans of the LoRA kernels for the present GPU: one field after another, from the default plan on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from peft_dist.kernels.lora_plans import GroupPlan, GroupShape, default_plan, fit_plan, rank_room, tile_count
from peft_dist.kernels.lora_tiles import max_tiles

Measure = Callable[[GroupPlan], float]
"""Microseconds of a launch with this plan, infinite where the card cannot run it."""
Fields = dict[str, tuple[Any, ...]]

# A plan that is as good within the noise does not replace a simpler one that was there.
_BETTER = 0.98
# Outputs of a program that loops come in whole blocks (``GroupPlan.loop_n``).
_LOOP_STEP = 256


def fields_of(shape: GroupShape, gate: bool) -> Fields:
    """What is tried of each field of a plan, in this order, around the default plan.

    Args:
        gate: The expand is the one that is fused with a gated activation.
    """
    default, is_decode = default_plan(shape), shape.tile_rows == 16
    shrink: Fields = (
        {"split": (4, 8, 16, 28), "block_k": (128, 256, 512), "shrink_warps": (1, 2, 4)}
        if is_decode
        else {"split": (1, 2, 4), "block_k": (64, 128), "shrink_warps": (4, 8), "shrink_r": (16, 32, 64)}
    )
    warps = (2, 4, 8) if is_decode else (4, 8)
    if default.loop_n:
        # The former first: it decides how much there is for the others to do.
        name, outputs = ("gate_loop_n", default.gate_loop_n) if gate else ("loop_n", default.loop_n)
        loops = {outputs - _LOOP_STEP, outputs + _LOOP_STEP, outputs + 2 * _LOOP_STEP, outputs // 2, 2 * outputs}
        expand: Fields = {
            name: tuple(sorted(n for n in loops if n > 0 and n % _LOOP_STEP == 0)),
            "gate_warps" if gate else "expand_warps": warps[:2],
            "loop_stages": (3, 4, 5),
        }
    else:
        name, warp_name = ("gate_n", "gate_warps") if gate else ("block_n", "expand_warps")
        expand = {name: (64, 128, 256, 512), warp_name: warps}
    # The expand first: most of the time is there.
    return {**expand, **shrink}


def descend(
    shape: GroupShape, start: GroupPlan, fields: Fields, measure: Measure, is_over: Callable[[], bool]
) -> GroupPlan:
    """The best plan that changing one field at a time finds, or has found when ``is_over`` says that time is up."""
    best, least = start, measure(start)
    known = {start}
    for name, values in fields.items():
        for value in values:
            plan = fit_plan(replace(best, **{name: value}), shape)
            if plan in known:
                continue
            if is_over():
                return best
            known.add(plan)
            time = measure(plan)
            if time < _BETTER * least:
                best, least = plan, time
    return best


def shapes_of(
    in_features: int, out_features: tuple[int, ...], max_num_seqs: int, max_loras: int, max_tokens: int, rank: int
) -> Iterator[GroupShape]:
    """Shapes worth measuring for a group of layers: all counts of tiles at decode, and the one of long tiles."""
    counts = sorted({tile_count(tiles, 16) for tiles in range(1, max_tiles(max_num_seqs, max_loras, 16) + 1)})
    yield from (GroupShape(16, count, in_features, out_features, rank_room(rank)) for count in counts)
    for tile_rows in (32, 64, 128):
        if (count := tile_count(1, tile_rows)) * tile_rows <= 2 * max_tokens:
            yield GroupShape(tile_rows, count, in_features, out_features)


def in_order(shapes: Sequence[GroupShape]) -> list[GroupShape]:
    """Those first that time is to be left for: decode steps of 32 rows, then others, then prefills."""
    return sorted(shapes, key=lambda shape: (-share_of(shape), shape.tile_rows))


def share_of(shape: GroupShape) -> int:
    """How much of the time a shape gets, beside others."""
    return {64: 4, 256: 3, 16: 2, 4: 2, 1: 2}[shape.max_tiles] if shape.tile_rows == 16 else 1
