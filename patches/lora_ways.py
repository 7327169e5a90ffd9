"""Ways to multiply layers that have adapters in a pass, and which of them is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from peft_dist.forward_context import ForwardContext
from peft_dist.kernels.glue import Activation
from peft_dist.kernels.lora_parts_beside import Multiply
from peft_dist.kernels.product_plans import ProductPlan
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan
from peft_dist.patches.together import plain_weight

Weights = Sequence[LoRALayerWeights | None]
Beside = Callable[[Multiply], tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]
"""``PartsBeside.compute`` of some layers: what multiplies them, to outputs and parts."""


def planned(
    x: torch.Tensor,
    weights: Weights,
    plans: Sequence[LoRAPlan],
    context: ForwardContext,
    activation: Activation | None = None,
) -> ProductPlan | None:
    """The way that was measured to be the fastest for layers that read x; None where it was not."""
    if context.products is None or len(plans) != 1:
        return None
    widths, few = [w.B.shape[1] for w in weights if w is not None], context.few_rows
    may_be_inside = few is not None and plans[0].fuses and few.adds(plans[0].num_rows, x.shape[-1], widths, activation)
    return context.products.adapted(x, weights, plans[0], few=may_be_inside, activation=activation)


def beside(
    x: torch.Tensor, weights: Weights, plans: Sequence[LoRAPlan], context: ForwardContext, plan: ProductPlan | None
) -> Beside | None:
    """What computes the parts of layers that read x beside their products; None where another way is taken.

    Args:
        plan: Of ``planned``.
    """
    found = context.parts_beside
    if found is None or len(plans) != 1 or not found.fits(x, weights, plans[0]):
        return None
    if plan is None:
        return partial(found.compute, x, weights, plans[0]) if found.takes(x, weights, plans[0]) else None
    return partial(found.compute, x, weights, plans[0], spared=plan.spared) if plan.way == "beside" else None


def tries_inside(plan: ProductPlan | None, computes_beside: Beside | None = None) -> bool:
    """Whether ``inside`` is the way to try: also for what is best beside, where nobody would add the parts."""
    return plan is None or plan.way == "inside" or (plan.way == "beside" and computes_beside is None)


def inside(
    below: Sequence[nn.Module],
    x: torch.Tensor,
    weights: Weights,
    plans: Sequence[LoRAPlan],
    context: ForwardContext,
    activation: Activation | None = None,
) -> torch.Tensor | None:
    """The layers with their adapters in one launch, where the pass has few rows (``FewRows.add_lora``).

    Args:
        below: What multiplies the layers in this pass.
    """
    if context.few_rows is None or len(plans) > 1 or not plans[0].fuses:
        return None
    weight = plain_weight(below, context)
    return None if weight is None else context.few_rows.add_lora(x, weight, weights, plans[0], activation)
