"""Decoder layers whose additions are computed together with the norms that read the sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_dist.forward_context import current
from peft_dist.patches.forms import method_matches
from peft_dist.patches.fused_norm import add_and_norm
from peft_dist.patches.fusion import fusion_of, has_hooks, is_fused

_MODELS = "transformers.models"
LLAMA = (
    f"{_MODELS}.llama.modeling_llama:LlamaDecoderLayer.forward",
    f"{_MODELS}.mixtral.modeling_mixtral:MixtralDecoderLayer.forward",
)
GEMMA = (
    f"{_MODELS}.gemma2.modeling_gemma2:Gemma2DecoderLayer.forward",
    f"{_MODELS}.gemma3.modeling_gemma3:Gemma3DecoderLayer.forward",
)
# Layers pass these to their attention whether they were given them or not.
_OPTIONAL: dict[str, Any] = {"attention_mask": None, "position_embeddings": None}


class FusedLayer(nn.Module):
    """A decoder layer's ``forward`` inside a ForwardContext.

    Its last sum is handed to the norm that reads it: the next layer's first, or the model's last. Whether that norm
    gets this very tensor is checked there.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[B, S, hidden_size]`` to the same."""
        fusion, context = fusion_of(self), current()
        glue = fusion.glue(hidden_states)
        if glue is None or context is None or args:
            output: torch.Tensor = super().forward(hidden_states, *args, **kwargs)
            return output
        inner = self._modules
        between, last = fusion.options["between"], fusion.options["next_norm"]
        x = inner["input_layernorm"](hidden_states)
        # Where the sum comes next, its kernel adds what the adapters' part of a projection is, too.
        sums_next = between == "post_attention_layernorm"
        context.takes_part = sums_next and _is_plain(inner["self_attn"])
        x, _ = inner["self_attn"](hidden_states=x, **_OPTIONAL | kwargs)
        part = context.take_part(x)
        if between == "pre_feedforward_layernorm":
            x = inner["post_attention_layernorm"](x)
        total = add_and_norm(context, glue, x, hidden_states, inner[between], part)
        x = inner[between](total)
        context.takes_part = sums_next and _is_plain(inner["mlp"])
        x = inner["mlp"](x)
        part = context.take_part(x)
        if between == "pre_feedforward_layernorm":
            x = inner["post_feedforward_layernorm"](x)
        return add_and_norm(context, glue, x, total, last, part)


def _is_plain(module: nn.Module | None) -> bool:
    """Whether nobody but the module's own code sees what it returns."""
    return module is not None and is_fused(module) and not has_hooks(module) and "forward" not in module.__dict__


def match_layer(module: nn.Module) -> dict[str, Any] | None:
    """Which norm stands between attention and MLP, for a module whose code is a decoder layer's."""
    if any(method_matches(module, form) for form in LLAMA):
        return {"between": "post_attention_layernorm", "next_norm": None}
    if any(method_matches(module, form) for form in GEMMA):
        return {"between": "pre_feedforward_layernorm", "next_norm": None}
    return None


def following_norms(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """The norm that reads a layer's output, where layers stand in a row: a guess that each call checks."""
    found: dict[nn.Module, nn.Module] = {}
    for parent in model.modules():
        layers = parent._modules.get("layers")
        if not isinstance(layers, nn.ModuleList):
            continue
        firsts = [layer._modules.get("input_layernorm") for layer in layers]
        norms = [*firsts[1:], parent._modules.get("norm")]
        found.update((layer, norm) for layer, norm in zip(layers, norms, strict=True) if norm is not None)
    return found
