"""Linear layers of steps of few rows, which do little but read weights: our kernel, where it reads them faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from peft_dist.kernels import glue
from peft_dist.kernels.glue import Activation
from peft_dist.kernels.lora_fused_plans import FusedPlan, choose_plan
from peft_dist.kernels.lora_workspace import LoRAWorkspace
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan


class FewRows:
    """Products, and products with their adapters' parts, in one launch each; None wherever another way is to be taken.

    Args:
        choose: How a product is launched, if at all: ``choose_plan``, or a stand-in for tests.
    """

    def __init__(self, device: torch.device | str, choose: Callable[..., FusedPlan | None] = choose_plan) -> None:
        # Not that of the adapters' pool, where another launch may leave something beside a product meanwhile.
        self._workspace = LoRAWorkspace(device)
        self._choose = choose

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, activation: Activation | None = None
    ) -> torch.Tensor | None:
        """``x @ weight.T``.

        Args:
            x: ``[..., in_features]``.
            weight: ``[out_features, in_features]``.
            activation: Of the weight's two halves, ``activation(first) * second`` is wanted.
        """
        launch = self._launch_of(x, weight, activation)
        if launch is None:
            return None
        from peft_dist.kernels import lora_fused

        return lora_fused.plain_linear(x, weight, self._workspace, launch=launch, activation=activation)

    def takes(self, x: torch.Tensor, weight: torch.Tensor, activation: Activation | None = None) -> bool:
        """Whether ``multiply`` computes these."""
        return self._launch_of(x, weight, activation) is not None

    def _launch_of(self, x: torch.Tensor, weight: torch.Tensor, activation: Activation | None) -> FusedPlan | None:
        outputs, inputs = weight.shape
        widths = [outputs] if activation is None else [outputs // 2] * 2
        launch = self._choose(x.numel() // inputs, inputs, widths, gated=activation is not None, has_adapters=False)
        if launch is None:
            return None
        from peft_dist.kernels import lora_fused

        return launch if lora_fused.can_multiply(x, weight, widths, launch) else None

    def add_lora(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        weights: Sequence[LoRALayerWeights | None],
        plan: LoRAPlan,
        activation: Activation | None = None,
    ) -> torch.Tensor | None:
        """``lora.add_lora_group_`` to ``x @ weight.T``, or ``lora.lora_gate`` of it, each element rounded once.

        Args:
            weight: ``[sum of out_features, in_features]``; the layers' rows follow each other.
            plan: ``fuses`` holds.
        """
        resident = [w for w in weights if w is not None]
        if len(resident) < len(weights) or not plan.fuses or plan.backend != "triton":
            return None
        widths = [w.B.shape[1] for w in resident]
        rows, inputs = plan.num_rows, weight.shape[1]
        gated, launch = self._launches(rows, inputs, widths, activation)
        if launch is None:
            return None
        from peft_dist.kernels import lora_fused

        if not lora_fused.can_fuse(x, weight, resident, plan, launch):
            return None
        inside = activation if gated else None
        y = lora_fused.fused_linear(x, weight, resident, plan, launch=launch, activation=inside)
        if activation is None or gated:
            return y
        gate, up = y.view(rows, -1).split(widths, dim=1)
        return glue.implementation("triton").gated(gate, up, activation).view(*x.shape[:-1], -1)

    def adds(self, rows: int, in_features: int, widths: Sequence[int], activation: Activation | None = None) -> bool:
        """Whether ``add_lora`` knows how to launch layers of these sizes."""
        return self._launches(rows, in_features, widths, activation)[1] is not None

    def _launches(
        self, rows: int, in_features: int, widths: Sequence[int], activation: Activation | None
    ) -> tuple[FusedPlan | None, FusedPlan | None]:
        """(with the activation in the same launch, the one to take)."""
        gated = None
        if activation is not None:
            gated = self._choose(rows, in_features, widths, gated=True, has_adapters=True)
        return gated, gated or self._choose(rows, in_features, widths, gated=False, has_adapters=True)
