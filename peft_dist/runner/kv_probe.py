"""Find out what each attention layer stores, by asking it."""

from __future__ import annotations

import contextvars
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from peft_dist.core.errors import ConfigError
from peft_dist.patches.attention import ATTENTION_NAME, register

_PROBE = "pd_probe"
_shapes: contextvars.ContextVar[dict[int, tuple[int, int]]] = contextvars.ContextVar("peft_dist_kv_shapes")


def _record(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    if key.shape != value.shape:
        raise ConfigError(
            f"{type(module).__name__}: keys {list(key.shape)} and values {list(value.shape)} differ in shape, "
            "which the paged cache does not support"
        )
    layer: Any = module.layer_idx
    _shapes.get()[int(layer)] = (key.shape[1], key.shape[3])
    return torch.zeros_like(query).transpose(1, 2), None


def probe_kv_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(num_kv_heads, head_dim) of every attention layer, by layer index; leaves the model set to paged attention.

    One token goes through the model under an attention function that writes down what it is given. This holds
    for every architecture that calls attention through transformers' interface, however its configuration
    names things.

    Raises:
        ConfigError: the architecture does not use the interface, or its keys and values differ in shape.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise ConfigError(
            f"{type(model).__name__} does not route its attention through transformers' AttentionInterface, so its KV "
            "cannot be paged: use an architecture that does (Llama, Mistral, Qwen, Gemma, Phi-3, OPT, GPT-2, ...)"
        )
    register()
    AttentionInterface.register(_PROBE, _record)
    model.set_attn_implementation(_PROBE)
    token = _shapes.set({})
    try:
        with torch.inference_mode():
            ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            model(input_ids=ids, position_ids=ids, use_cache=False)
        shapes = _shapes.get()
    finally:
        _shapes.reset(token)
    model.set_attn_implementation(ATTENTION_NAME)
    if sorted(shapes) != list(range(len(shapes))) or not shapes:
        raise ConfigError(f"{type(model).__name__}: attention layers {sorted(shapes)} are not numbered from 0")
    return [shapes[layer] for layer in range(len(shapes))]
