"""Find out what each attention layer stores, by asking it."""

from __future__ import annotations

import contextvars
import inspect
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from peft_dist.core.errors import ConfigError
from peft_dist.patches.attention import (
    ATTENTION_NAME,
    UnsupportedAttentionError,
    refuse_missing_window,
    refuse_unsupported,
    register,
)
from peft_dist.patches.paging import decoder_reason, windowed_layers

_PROBE = "pd_probe"
_HONOURED = {"scaling", "sliding_window", "softcap", "s_aux"}
_REMEDY = (
    "the engine would not answer as transformers does. Use another base model here, or this one with PEFT: "
    "peft_dist.patch(model) leaves its attention to Hugging Face"
)


@dataclass(slots=True)
class _Found:
    windowed: Collection[int]
    shapes: dict[int, tuple[int, int]] = field(default_factory=dict)


_found: contextvars.ContextVar[_Found] = contextvars.ContextVar("peft_dist_probe")


def _record(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    if key.shape != value.shape:
        raise ConfigError(
            f"{type(module).__name__}: keys {list(key.shape)} and values {list(value.shape)} differ in shape, "
            f"which the paged cache does not hold: {_REMEDY}"
        )
    refuse_unsupported(module, *args, **{name: value for name, value in kwargs.items() if name not in _HONOURED})
    number: Any = module.layer_idx
    layer, found = int(number), _found.get()
    if layer in found.windowed and kwargs.get("sliding_window") is None:
        refuse_missing_window(module)
    found.shapes[layer] = (key.shape[1], key.shape[3])
    return torch.zeros_like(query).transpose(1, 2), None


def probe_kv_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(num_kv_heads, head_dim) of every attention layer, by layer index; leaves the model set to paged attention.

    One token goes through the model under an attention function that writes down what it is given. This holds
    for every architecture that calls attention through transformers' interface, however its configuration
    names things.

    Raises:
        ConfigError: paged attention does not compute what the architecture does.
    """
    reason = decoder_reason(model)
    if reason is None and "logits_to_keep" not in inspect.signature(model.forward).parameters:
        reason = f"{type(model).__name__} takes no logits_to_keep"
    if reason:
        raise ConfigError(f"{reason}: {_REMEDY}")
    register()
    AttentionInterface.register(_PROBE, _record)
    model.set_attn_implementation(_PROBE)
    found = _Found(windowed_layers(model))
    token = _found.set(found)
    try:
        with torch.inference_mode():
            ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            model(input_ids=ids, position_ids=ids, use_cache=False)
    except UnsupportedAttentionError as error:
        raise ConfigError(f"{error.reason}: {_REMEDY}") from error
    finally:
        _found.reset(token)
    model.set_attn_implementation(ATTENTION_NAME)
    shapes = found.shapes
    if sorted(shapes) != list(range(len(shapes))) or not shapes:
        raise ConfigError(
            f"{type(model).__name__}: attention layers {sorted(shapes)} are not numbered from 0: {_REMEDY}"
        )
    return [shapes[layer] for layer in range(len(shapes))]
