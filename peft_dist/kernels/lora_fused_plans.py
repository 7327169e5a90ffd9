"""Which linears of a decode step are one launch with their adapters, and how it is launched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FusedPlan:
    """Launch parameters.

    Attributes:
        block_n, block_k: Outputs of a program, and inputs that it has in work at once.
        split: Parts of the inputs, each summed by a program of its own; ``split * block_k`` divides the inputs.
        stages: Blocks of the weight under way.
        swap: The product is computed turned.
        tma: The weight comes by descriptors.
        each: Tiles that an expand has in work at once, a power of two.
        ahead: The first block of B is asked for before the product.
        shrink_split, shrink_k, shrink_stages: ``split``, ``block_k`` and ``stages`` of the shrinks.
        expand_stages: Blocks of B under way.
    """

    block_n: int = 64
    block_k: int = 128
    split: int = 1
    stages: int = 3
    warps: int = 4
    swap: bool = True
    tma: bool = False
    each: int = 4
    ahead: bool = False
    shrink_split: int = 1
    shrink_k: int = 256
    shrink_stages: int = 3
    expand_stages: int = 2


def fused_plan(
    num_rows: int, in_features: int, out_features: Sequence[int], max_tiles: int, *, gated: bool
) -> FusedPlan | None:
    """How layers that read one input are launched together with their adapters; None: apart, as that is faster.

    Args:
        num_rows: Of the step.
        out_features: Of each layer, one to three.
        max_tiles: Of the ``LoRATiles``.
        gated: The layers are a gated MLP's two, with the activation in the same launch.
    """
    return None
