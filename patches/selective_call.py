"""One call of a patched model: a context around each of its forward passes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from peft_dist.forward_context import ForwardContext
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan
from peft_dist.patches.attention import ATTENTION_NAME, UnsupportedAttentionError
from peft_dist.patches.paged_cache import PagedCache
from peft_dist.patches.paging import windowed_layers

# Enough for a prefill and decodes; passes that grow token by token (no cache) reuse none.
_MAX_PLANS = 8


class SelectiveCall:
    """Rows of adapters for the forward passes that one call of ``forward`` or ``generate`` makes.

    Args:
        model: The base model as PEFT has changed it.
        row_slots: int32 ``[rows of the call]``, adapter slot of each row, -1 for the base. A pass over k times as
            many rows (beams, returned sequences) repeats each slot k times.
        weights: Stacked weights by layer.
        pages: Whether an empty dynamic cache that Hugging Face brings is to become a paged one.

    Attributes:
        refusal: Why attention and cache were left to Hugging Face after all, once that is known.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        row_slots: np.ndarray,
        weights: Sequence[LoRALayerWeights | None],
        pages: bool,
    ) -> None:
        self.model = model
        self.row_slots = row_slots
        self.weights = weights
        self.pages = pages
        self.refusal: str | None = None
        self.caches: list[PagedCache] = []
        self._plans: dict[tuple[int, int], LoRAPlan | None] = {}
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._configs = _attention_configs(model) if pages else []
        self._windowed = windowed_layers(model) if pages else ()

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One forward pass of the base model."""
        inputs = _inputs(args, kwargs)
        is_first = not isinstance(kwargs.get("past_key_values"), PagedCache)
        cache = self._paged_cache(kwargs, inputs)
        if cache is not None:
            context = self._context(inputs, kwargs)
            context.attention, context.token_rows = cache.paged.begin(_new_tokens(kwargs, *inputs.shape[:2]))
            context.kv_caches, context.windowed = cache.paged.caches, self._windowed
            try:
                with context, use_paged_attention(self._configs):
                    return forward(*args, **kwargs)
            except UnsupportedAttentionError as error:
                # What a model passes to its attention is only known when it does. Nothing has been answered yet in
                # the first pass of a cache, so Hugging Face can begin anew; later ones were like the first.
                if not is_first:
                    raise
                self.refusal, self.pages = error.reason, False
                cache.discard()
        with self._context(inputs, kwargs):
            return forward(*args, **kwargs)

    def _context(self, inputs: torch.Tensor, kwargs: dict[str, Any]) -> ForwardContext:
        rows, steps = inputs.shape[:2]
        kept = _kept(steps, kwargs.get("logits_to_keep")) if self._keeps_logits else steps
        return ForwardContext(
            lora=self._plan(rows, steps),
            lora_logits=self._plan(rows, kept),
            lora_weights=self.weights,
        )

    def finish(self, result: Any) -> None:
        """Give back as Hugging Face's own what the result keeps of the caches."""
        kept = getattr(result, "past_key_values", None)
        for cache in self.caches:
            if cache is kept and isinstance(cache, PagedCache):
                cache.release()

    def _plan(self, rows: int, steps: int) -> LoRAPlan | None:
        """Plans are kept while shapes recur: what kernels derive from one serves every later pass."""
        if (rows, steps) not in self._plans:
            copies, rest = divmod(rows, len(self.row_slots))
            if rest:
                raise ValueError(
                    f"the model was called with {rows} rows, which is no multiple of the {len(self.row_slots)} "
                    "adapter_names given: pass one name per row of the batch"
                )
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[rows, steps] = LoRAPlan.from_rows(np.repeat(self.row_slots, copies * steps))
        return self._plans[rows, steps]

    def _paged_cache(self, kwargs: dict[str, Any], inputs: torch.Tensor) -> PagedCache | None:
        """The paged cache to use in this pass; None leaves attention and cache to Hugging Face."""
        cache = kwargs.get("past_key_values")
        if isinstance(cache, PagedCache):
            if self._can_page(kwargs) and _new_tokens(kwargs, *inputs.shape[:2]).all():
                return cache
            cache.release()
        elif self.pages and _is_fresh(cache) and self._can_adopt(kwargs, inputs):
            self.caches.append(PagedCache.adopt(cache, len(inputs), inputs.device))
            return self.caches[-1]
        return None

    def _can_adopt(self, kwargs: dict[str, Any], inputs: torch.Tensor) -> bool:
        return self._can_page(kwargs) and _is_left_padded(_new_tokens(kwargs, *inputs.shape[:2]))

    def _can_page(self, kwargs: dict[str, Any]) -> bool:
        mask, attentions = kwargs.get("attention_mask"), kwargs.get("output_attentions")
        if attentions if attentions is not None else self.model.config.output_attentions:
            return False
        return mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2)


@contextmanager
def intercept(model: PreTrainedModel, run: Callable[..., Any]) -> Iterator[None]:
    """While entered, ``model(...)`` calls ``run(forward, ...)``; afterwards the model is exactly as before."""
    own = model.__dict__.get("forward")
    forward = model.forward

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return run(forward, *args, **kwargs)

    model.__dict__["forward"] = wrapper
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own


@contextmanager
def use_paged_attention(configs: Sequence[PreTrainedConfig]) -> Iterator[None]:
    """While entered, attention modules with these configurations run paged attention.

    Written to the field that they read: ``set_attn_implementation`` checks and rebuilds far more than one
    forward pass may cost, and would not bring back what stood there.
    """
    before = [(config, config._attn_implementation_internal) for config in configs]
    try:
        for config, _ in before:
            config._attn_implementation_internal = ATTENTION_NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def _attention_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every configuration object that a module outside of the adapter layers reads."""
    found: dict[int, PreTrainedConfig] = {}
    remaining: list[nn.Module] = [model]
    while remaining:
        module = remaining.pop()
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            found[id(config)] = config
        remaining += [child for child in module.children() if not isinstance(child, BaseTunerLayer)]
    return list(found.values())


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    inputs = args[0] if args else kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs.get("inputs_embeds")
    if inputs is None:
        raise ValueError("the model needs input_ids or inputs_embeds")
    return inputs


def _kept(steps: int, logits_to_keep: int | torch.Tensor | None) -> int:
    """Positions of each row that reach ``lm_head``."""
    if logits_to_keep is None:
        return steps
    if isinstance(logits_to_keep, int):
        return min(steps, logits_to_keep) or steps
    return len(torch.arange(steps)[logits_to_keep.cpu()])


def _new_tokens(kwargs: dict[str, Any], rows: int, steps: int) -> np.ndarray:
    """bool ``[rows, steps]``, which of this pass's inputs are tokens and not padding."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return np.ones((rows, steps), bool)
    tokens: np.ndarray = mask[:, -steps:].ne(0).cpu().numpy()
    return tokens


def _is_left_padded(tokens: np.ndarray) -> bool:
    """Whether each row ends in tokens with all its padding before them.

    Elsewhere padding takes part in the answer (its logits are drawn from, windows count it): that is left to
    Hugging Face, so a paged row never has padding behind its first token.
    """
    return bool(tokens[:, -1].all() and not (tokens[:, :-1] & ~tokens[:, 1:]).any())


def _is_fresh(cache: Any) -> bool:
    return type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0
