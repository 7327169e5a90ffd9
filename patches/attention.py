"""Paged attention under a name of its own in Hugging Face's attention interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from transformers import AttentionInterface

from peft_dist.forward_context import ForwardContext, current
from peft_dist.kernels import attention as kernels
from peft_dist.patches.cache_name import NAMES

ATTENTION_NAME = "pd_paged"

# Keyword arguments that models pass along and that change nothing here: causality, padding and length come from
# the context's metadata, rotary embeddings are already in query and key. Everything else is refused when set.
_WITHOUT_EFFECT = frozenset(
    {
        *NAMES,
        "assistant_tokenizer",
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "tokenizer",
        "use_cache",
    }
)


class UnsupportedAttentionError(NotImplementedError):
    """A model asks of its attention what paged attention does not do. ``reason`` says what, without a remedy."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: run this model with attention implementation 'sdpa'")
        self.reason = reason


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Write this step's keys and values into the paged cache of the entered context and attend from there.

    Args:
        query: ``[B, num_heads, S, head_dim]`` after rotary embedding. The engine packs all sequences into
            ``B = 1``; the drop-in passes a padded batch and names the rows that hold tokens in the context.
        key, value: ``[B, num_kv_heads, S, head_dim]``, the tokens of this step only.
        attention_mask: Must be None: the context's metadata says who sees what.
        scaling: Factor of the scores; ``head_dim ** -0.5`` when None.
        sliding_window, softcap, s_aux: As in the kernel (``s_aux`` are attention sinks).

    Returns:
        ``[B, S, num_heads, value head_dim]`` with zeros in padded rows, and None for the attention weights.

    Raises:
        RuntimeError: no ForwardContext with attention metadata is entered.
        UnsupportedAttentionError: the model passes an argument that would change the result, or not its window.
    """
    context = current()
    if context is None or context.attention is None:
        raise RuntimeError(
            f"attention implementation {ATTENTION_NAME!r} runs only inside a ForwardContext that holds attention "
            "metadata: call model.set_attn_implementation('sdpa') to use this model outside of peft_dist"
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    if attention_mask is not None or dropout or is_causal is False or output_attentions or kwargs:
        refuse_unsupported(module, attention_mask, dropout, is_causal, output_attentions, **kwargs)
    if sliding_window is None and layer in context.windowed:
        refuse_missing_window(module)
    steps, head_dim = query.shape[2:]
    cache = context.kv_caches[layer]
    kernels.write_kv(_pack(key, context), _pack(value, context), cache, context.attention)
    packed = kernels.paged_attention(
        _pack(query, context),
        cache,
        context.attention,
        scale=head_dim**-0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return _unpack(packed, context, len(query), steps), None


def _pack(states: torch.Tensor, context: ForwardContext) -> torch.Tensor:
    """``[B, H, S, D]`` to the ``[T, H, D]`` rows that hold tokens."""
    rows = states.transpose(1, 2).flatten(0, 1)
    return rows if context.token_rows is None else rows.index_select(0, context.token_rows)


def _unpack(packed: torch.Tensor, context: ForwardContext, batch: int, steps: int) -> torch.Tensor:
    """``[T, H, D]`` to ``[B, S, H, D]``, zeros where a row holds no token."""
    if context.token_rows is not None:
        rows = packed.new_zeros(batch * steps, *packed.shape[1:])
        packed = rows.index_copy_(0, context.token_rows, packed)
    return packed.view(batch, steps, *packed.shape[1:])


def refuse_unsupported(
    module: torch.nn.Module,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    output_attentions: bool | None = None,
    **settings: Any,
) -> None:
    """Raises UnsupportedAttentionError when a model passes one of these, or of ``settings``, to paged attention.

    The arguments are those of ``paged_attention_forward`` that may have no effect.
    """
    settings = {name: value for name, value in settings.items() if name not in _WITHOUT_EFFECT}
    settings |= {
        "attention_mask": attention_mask,
        "dropout": dropout or None,
        "is_causal": None if is_causal else is_causal,
        "output_attentions": output_attentions or None,
    }
    bad = sorted(name for name, value in settings.items() if value is not None)
    if bad:
        raise UnsupportedAttentionError(
            f"paged attention cannot honour {', '.join(bad)}, which {type(module).__name__} (layer "
            f"{getattr(module, 'layer_idx', '?')}) passes"
        )


def changes_nothing(settings: Mapping[str, Any]) -> bool:
    """Whether paged attention takes these keyword arguments, that is ignores them."""
    return all(value is None or name in _WITHOUT_EFFECT for name, value in settings.items())


def refuse_missing_window(module: torch.nn.Module) -> NoReturn:
    """Raises UnsupportedAttentionError for a layer whose window only the mask knows, which is not built here."""
    raise UnsupportedAttentionError(
        f"the mask has a sliding window, of which {type(module).__name__} (layer {module.layer_idx}) tells its "
        "attention nothing"
    )


def register() -> None:
    """Make ``attn_implementation='pd_paged'`` known to transformers. Idempotent.

    No mask function is registered under the name on purpose: transformers then builds no mask at all.
    """
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)
