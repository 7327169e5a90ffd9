"""Attention modules whose rotary embedding and KV write are one kernel, on the columns of the joint projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_dist.forward_context import ForwardContext, current
from peft_dist.kernels import attention as kernels
from peft_dist.kernels.glue import Glue, Norm
from peft_dist.patches.attention import ATTENTION_NAME, changes_nothing
from peft_dist.patches.cache_name import NAMES
from peft_dist.patches.forms import global_matches, method_matches
from peft_dist.patches.fused_norm import match_norm
from peft_dist.patches.fusion import fusion_of, has_hooks
from peft_dist.patches.lora_apart import run_apart, run_before_sum
from peft_dist.patches.together import call_each

_MODELS = "transformers.models"
ROTARY = {
    "apply_rotary_pos_emb": f"{_MODELS}.llama.modeling_llama:apply_rotary_pos_emb",
    "rotate_half": f"{_MODELS}.llama.modeling_llama:rotate_half",
}
_LLAMA: dict[str, Any] = {"window": None, "softcap": False, "norms": False}
FORMS: dict[str, dict[str, Any]] = {
    f"{_MODELS}.llama.modeling_llama:LlamaAttention.forward": _LLAMA,
    f"{_MODELS}.mistral.modeling_mistral:MistralAttention.forward": _LLAMA | {"window": "config"},
    f"{_MODELS}.qwen2.modeling_qwen2:Qwen2Attention.forward": _LLAMA | {"window": "module"},
    f"{_MODELS}.qwen3.modeling_qwen3:Qwen3Attention.forward": _LLAMA | {"window": "module", "norms": True},
    f"{_MODELS}.gemma2.modeling_gemma2:Gemma2Attention.forward": _LLAMA | {"window": "module", "softcap": True},
    f"{_MODELS}.gemma3.modeling_gemma3:Gemma3Attention.forward": _LLAMA | {"window": "module", "norms": True},
}


class FusedAttention(nn.Module):
    """An attention module's ``forward`` inside a ForwardContext whose attention is paged and whose rows are packed.

    Keys are never stored but in the cache. With anything that paged attention refuses, or that only a padded batch
    has, the original code runs, and it decides.
    """

    config: Any
    head_dim: int
    scaling: float
    layer_idx: int
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[1, T, hidden_size]`` to the same, and None for the attention weights."""
        context = current()
        glue = fusion_of(self).glue(hidden_states)
        asked = kwargs | {"attention_mask": attention_mask}
        if (
            context is None
            or glue is None
            or position_embeddings is None
            or any(kwargs.get(name) is not None for name in NAMES)
            or not changes_nothing(asked)
            or not _is_plain(self, context)
            or position_embeddings[0].shape[:2] != hidden_states.shape[:2]
            or len(hidden_states) != 1
        ):
            output: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **kwargs,
            )
            return output
        attended = _attend(self, glue, context, hidden_states, position_embeddings)
        return run_before_sum(self.o_proj, attended), None


def _attend(
    module: FusedAttention,
    glue: Glue,
    context: ForwardContext,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """``[1, T, num_heads * head dim of the values]``."""
    rows, head_dim, meta = hidden_states.shape[1], module.head_dim, context.attention
    assert meta is not None
    projections = module.q_proj, module.k_proj, module.v_proj
    apart = run_apart(projections, hidden_states)
    outputs, parts = apart or (call_each(projections, hidden_states), None)
    query, key, value = (output.view(rows, -1, head_dim) for output in outputs)
    added = None if parts is None else [part.view(rows, -1, head_dim) for part in parts]
    cos, sin = (table.reshape(rows, -1) for table in position_embeddings)
    cache = context.kv_caches[module.layer_idx]
    query = glue.rotary_and_write(
        query, key, value, cos, sin, cache, meta.slot_mapping_t, *_head_norms(module), parts=added
    )
    attended = kernels.paged_attention(
        query,
        cache,
        meta,
        scale=module.scaling,
        sliding_window=_window(module),
        softcap=getattr(module, "attn_logit_softcapping", None) if fusion_of(module).options["softcap"] else None,
    )
    return attended.reshape(1, rows, -1)


def _is_plain(module: FusedAttention, context: ForwardContext) -> bool:
    """Whether this pass's attention is paged, over packed rows, and nobody looks at what is left out."""
    if module.training or context.attention is None or context.token_rows is not None:
        return False
    if module.config._attn_implementation != ATTENTION_NAME:
        return False
    if _window(module) is None and module.layer_idx in context.windowed:
        return False
    norms = (module.q_norm, module.k_norm) if fusion_of(module).options["norms"] else ()
    return not any(has_hooks(norm) for norm in norms)


def _window(module: FusedAttention) -> int | None:
    where = fusion_of(module).options["window"]
    if where is None:
        return None
    window: int | None = getattr(module.config if where == "config" else module, "sliding_window", None)
    return window


def _head_norms(module: FusedAttention) -> tuple[Norm | None, Norm | None]:
    options = fusion_of(module).options
    if not options["norms"]:
        return None, None
    query, key = (
        Norm(norm.weight.detach(), getattr(norm, style["eps"]), style["adds_one"], style["rounds"])
        for norm, style in zip((module.q_norm, module.k_norm), options["styles"], strict=True)
    )
    return query, key


def match_attention(module: nn.Module) -> dict[str, Any] | None:
    """What the form leaves open, for a module whose code is known; None for any other."""
    if not isinstance(getattr(module, "head_dim", None), int) or not isinstance(
        getattr(module, "layer_idx", None), int
    ):
        return None
    options = next((FORMS[form] for form in FORMS if method_matches(module, form)), None)
    if options is None or not all(global_matches(module, name, form) for name, form in ROTARY.items()):
        return None
    if not options["norms"]:
        return dict(options)
    styles = [match_norm(norm) if (norm := module._modules.get(n)) is not None else None for n in ("q_norm", "k_norm")]
    if None in styles or styles[0] != styles[1]:
        return None
    return options | {"styles": styles}
