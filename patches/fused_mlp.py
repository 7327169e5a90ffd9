"""Gated MLPs with the activation and the product as one kernel, which adds adapters' parts too where it can."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from peft_dist.kernels.glue import Activation
from peft_dist.patches.forms import method_matches
from peft_dist.patches.fusion import fusion_of, rows_of
from peft_dist.patches.lora_apart import run_before_sum, run_gated
from peft_dist.patches.together import call_each

LLAMA = "transformers.models.llama.modeling_llama:LlamaMLP.forward"


class FusedMLP(nn.Module):
    """The ``forward`` of an MLP with ``gate_proj``, ``up_proj`` and ``down_proj`` inside a ForwardContext."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., hidden_size]`` to the same."""
        fusion = fusion_of(self)
        glue = fusion.glue(x)
        if glue is None:
            output: torch.Tensor = super().forward(x)
            return output
        activation = fusion.options["activation"]
        gated = run_gated(self.gate_proj, self.up_proj, x, activation, glue)
        if gated is None:
            gate, up = call_each([self.gate_proj, self.up_proj], x)
            gated = glue.gated(rows_of(gate), rows_of(up), activation).view(gate.shape)
        return run_before_sum(self.down_proj, gated)


def match_mlp(module: nn.Module) -> dict[str, Any] | None:
    """The activation, for a module whose code is a gated MLP's; None for any other."""
    activation = getattr(module, "act_fn", None)
    name = _activation_of(activation)
    if name is None or (isinstance(activation, nn.Module) and "forward" in activation.__dict__):
        return None
    return {"activation": name} if method_matches(module, LLAMA) else None


def _activation_of(function: object) -> Activation | None:
    if type(function) in (nn.SiLU, type(ACT2FN["silu"])):
        return "silu"
    if type(function) is type(ACT2FN["gelu_pytorch_tanh"]):
        return "gelu_tanh"
    return "gelu_tanh" if isinstance(function, nn.GELU) and function.approximate == "tanh" else None
