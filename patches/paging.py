"""Which models and which calls of ``generate`` can keep their KV in paged blocks."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def paging_reason(model: PreTrainedModel, kwargs: dict[str, Any]) -> str | None:
    """Why attention and cache have to stay Hugging Face's, or None.

    What depends on a single forward pass (attention weights wanted, custom masks, the kind of the cache) is
    decided when it comes.
    """
    return _model_reason(model) or _call_reason(kwargs)


def decoder_reason(model: PreTrainedModel) -> str | None:
    """Why paged attention is not what the layers of this model's text decoder compute, or None."""
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        return f"{name} does not call its attention through transformers' AttentionInterface"
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES):
        return f"{name} has layers of type {', '.join(others)} (not only {' and '.join(sorted(_LAYER_TYPES))})"
    if getattr(config, "kv_lora_rank", None) or getattr(config, "num_kv_shared_layers", None):
        return f"{name} compresses or shares its keys and values"
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None):
        return f"{name} is not causal"
    return None


def windowed_layers(model: PreTrainedModel) -> Collection[int]:
    """Numbers of the layers for which Hugging Face builds a mask with a sliding window.

    Paged attention has no mask, so it must be told of the window; some families only put it into the mask.
    """
    config = model.config.get_text_config(decoder=True)
    if types := getattr(config, "layer_types", None):
        return frozenset(number for number, kind in enumerate(types) if kind == "sliding_attention")
    masks = hasattr(sys.modules[type(model).__module__], "create_sliding_window_causal_mask")
    return range(config.num_hidden_layers) if masks and getattr(config, "sliding_window", None) else ()


def _model_reason(model: PreTrainedModel) -> str | None:
    if model.config.get_text_config(decoder=True) is not model.config:
        return f"{type(model).__name__} has parts that are not a text decoder"
    return decoder_reason(model)


def _call_reason(kwargs: dict[str, Any]) -> str | None:
    if kwargs.get("past_key_values") is not None:
        return "generate was given a cache"
    if kwargs.get("custom_generate") is not None:
        return "generate was given custom_generate"
    if kwargs.get("output_attentions"):
        return "generate was asked for attention weights"
    return None
