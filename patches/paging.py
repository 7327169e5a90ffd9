"""Which models and which calls of ``generate`` can keep their KV in paged blocks."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def paging_reason(model: PreTrainedModel, kwargs: dict[str, Any]) -> str | None:
    """Why attention and cache have to stay Hugging Face's, or None.

    What depends on a single forward pass (attention weights wanted, custom masks, the kind of the cache) is
    decided when it comes.
    """
    return _model_reason(model) or _call_reason(kwargs)


def _model_reason(model: PreTrainedModel) -> str | None:
    config = model.config
    name = type(model).__name__
    if not model._supports_attention_backend:
        return f"{name} does not call its attention through transformers' interface"
    if config.get_text_config(decoder=True) is not config:
        return f"{name} has parts that are not a text decoder"
    if set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES:
        return f"{name} has layers other than {' and '.join(sorted(_LAYER_TYPES))}"
    if getattr(config, "kv_lora_rank", None) or getattr(config, "num_kv_shared_layers", None):
        return f"{name} compresses or shares its keys and values"
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None):
        return f"{name} is not causal"
    return None


def _call_reason(kwargs: dict[str, Any]) -> str | None:
    if kwargs.get("past_key_values") is not None:
        return "generate was given a cache"
    if kwargs.get("custom_generate") is not None:
        return "generate was given custom_generate"
    if kwargs.get("output_attentions"):
        return "generate was asked for attention weights"
    return None
