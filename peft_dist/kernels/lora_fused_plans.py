"""Which linears of a decode step are one launch with their adapters, and how it is launched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

MOST_ADDED_ROWS, MOST_MULTIPLIED_ROWS = 32, 64
"""Of steps with adapters, and without, on an H200; more are multiplied faster by torch's libraries."""
# On cards of less bandwidth, where those libraries reach more of it: an H100 takes 1.3 % longer for 64.
_MOST_MULTIPLIED_ELSEWHERE = 32

# Outputs of a program, and what inputs are a multiple of: every split of blocks of 128.
_OUTPUTS, _INPUTS = 64, 512
# Two programs for each of 132 processors.
_AT_ONCE = 264
# What is larger or smaller was not measured.
_MOST_OUTPUTS, _FEWEST_WEIGHTS = 1 << 15, 12 << 20


@dataclass(frozen=True, slots=True)
class FusedPlan:
    """Launch parameters.

    Attributes:
        block_k: Inputs that a program has in work at once.
        split: Parts of the inputs, each summed by a program of its own; ``split * block_k`` divides the inputs.
        stages: Blocks of the weight under way.
        block_n: Outputs of a program.
        tma: The weight comes by descriptors.
        each: Tiles that an expand has in work at once, a power of two.
        ahead: The first block of B is asked for before the product.
        shrink_split, shrink_k, shrink_stages: ``split``, ``block_k`` and ``stages`` of the shrinks.
        expand_stages: Blocks of B under way.
    """

    block_k: int = 128
    split: int = 1
    stages: int = 3
    block_n: int = 64
    warps: int = 4
    tma: bool = False
    each: int = 4
    ahead: bool = False
    shrink_split: int = 1
    shrink_k: int = 256
    shrink_stages: int = 3
    expand_stages: int = 2


def chooser_for(device_name: str) -> Callable[..., FusedPlan | None]:
    """``choose_plan`` of a card."""
    return choose_plan if "H200" in device_name else partial(choose_plan, most_multiplied=_MOST_MULTIPLIED_ELSEWHERE)


def choose_plan(
    num_rows: int,
    in_features: int,
    out_features: Sequence[int],
    *,
    gated: bool,
    has_adapters: bool,
    most_rows: int | None = None,
    most_multiplied: int = MOST_MULTIPLIED_ROWS,
) -> FusedPlan | None:
    """How layers that read one input are launched together in a step of few rows; None: by torch's libraries, and apart
    from their adapters, as that is not slower.

    As measured for an 8B Llama's layers on an H200 (132 processors, as an H100): as many programs as run at once, each
    of which streams 64 rows of the weight.

    Args:
        num_rows: Of the step.
        out_features: Of each layer, one to three.
        gated: The layers are a gated MLP's two, with the activation in the same launch.
        most_rows: None takes the known bound: MOST_ADDED_ROWS with adapters, ``most_multiplied`` without.
    """
    outputs = sum(out_features)
    if most_rows is None:
        most_rows = MOST_ADDED_ROWS if has_adapters else most_multiplied
    if not 0 < num_rows <= most_rows or outputs > _MOST_OUTPUTS or outputs * in_features < _FEWEST_WEIGHTS:
        return None
    if any(width % _OUTPUTS for width in out_features) or in_features % _INPUTS:
        return None
    is_short, blocks = num_rows <= 16, outputs // _OUTPUTS
    shrink_split = 8 if in_features > 8192 and len(out_features) == 1 else 4
    if gated or blocks > _AT_ONCE:
        # With many adapters a program with two layers' outputs is short of others that run meanwhile.
        pays = (is_short or not has_adapters) if gated else has_adapters
        shrink_split = shrink_split if is_short else 1
        return FusedPlan(64, 1, 4, tma=True, ahead=is_short, shrink_split=shrink_split) if pays else None
    split = next(parts for parts in (4, 2, 1) if blocks * parts <= _AT_ONCE)
    if split < 4 and not has_adapters:
        return None
    shrink_split = shrink_split if is_short or len(out_features) == 1 else 2
    # What is shorter leaves room for the shrinks' programs beside it, and what has fewer tiles for B.
    block_k, stages = (64, 4) if has_adapters and not is_short else (128, 3)
    return FusedPlan(block_k, split, stages, tma=split < 4, ahead=is_short, shrink_split=shrink_split)
