"""Root mean square norms as one kernel, together with the addition before them where a layer hands that over."""

from __future__ import annotations

import torch
from torch import nn

from peft_dist.forward_context import ForwardContext, current
from peft_dist.kernels.glue import Glue, Norm
from peft_dist.patches.forms import method_matches
from peft_dist.patches.fusion import fusion_of, is_fused, rows_of

_MODELS = "transformers.models"
LLAMA = f"{_MODELS}.llama.modeling_llama:LlamaRMSNorm.forward"
GEMMA = f"{_MODELS}.gemma.modeling_gemma:GemmaRMSNorm.forward"
GEMMA_NORM = f"{_MODELS}.gemma.modeling_gemma:GemmaRMSNorm._norm"
GPT_OSS = f"{_MODELS}.gpt_oss.modeling_gpt_oss:GptOssRMSNorm.forward"


class FusedNorm(nn.Module):
    """A norm's ``forward`` inside a ForwardContext."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., columns]`` to the same."""
        context, glue = current(), fusion_of(self).glue(x)
        norm = norm_of(self, x) if glue is not None else None
        if context is None or glue is None or norm is None:
            output: torch.Tensor = super().forward(x)
            return output
        return context.shared_output(self, 0, x, lambda x: [glue.rms_norm(rows_of(x), norm).view(x.shape)])


def match_norm(module: nn.Module) -> dict[str, object] | None:
    """What makes up ``Norm`` beside the weight, for a module whose code is a norm's; None for any other."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(module._parameters) != 1:
        return None
    if method_matches(module, LLAMA):
        style = {"eps": "variance_epsilon", "adds_one": False, "rounds": True}
    elif method_matches(module, GPT_OSS):
        style = {"eps": "variance_epsilon", "adds_one": False, "rounds": False}
    elif method_matches(module, GEMMA) and method_matches(module, GEMMA_NORM, "_norm"):
        style = {"eps": "eps", "adds_one": True, "rounds": False}
    else:
        return None
    return style if isinstance(getattr(module, str(style["eps"]), None), float) else None


def norm_of(module: nn.Module, x: torch.Tensor) -> Norm | None:
    """What a fused norm computes of x now; None where its result would not be of x's dtype, or it does not fit."""
    options = fusion_of(module).options
    weight = module._parameters["weight"]
    if weight is None or weight.device != x.device or weight.shape != x.shape[-1:] or not weight.is_contiguous():
        return None
    if options["rounds"] and weight.dtype != x.dtype:
        return None
    return Norm(weight.detach(), getattr(module, options["eps"]), options["adds_one"], options["rounds"])


def add_and_norm(
    context: ForwardContext,
    glue: Glue,
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: nn.Module | None,
    part: torch.Tensor | None = None,
) -> torch.Tensor:
    """``residual + x``, and ``part`` where that is still to be added to x; the norm that reads the sum next finds its
    output computed in the same pass."""
    fits = norm is not None and is_fused(norm) and x.shape == residual.shape and x.dtype == residual.dtype
    spec = norm_of(norm, x) if norm is not None and fits else None
    if norm is None or spec is None:
        return residual + (x if part is None else x + part)
    added = None if part is None else rows_of(part)
    normed, total = (out.view(x.shape) for out in glue.add_rms_norm(rows_of(x), rows_of(residual), spec, added))
    context.hand_over(norm, total, normed)
    return total
