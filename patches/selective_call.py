"""One call of a patched model: a context around each of its forward passes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel

from peft_dist.forward_context import ForwardContext
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan
from peft_dist.patches.attention import ATTENTION_NAME, UnsupportedAttentionError
from peft_dist.patches.cache_name import CACHE
from peft_dist.patches.decode_graphs import DecodeGraphs, DecodePass
from peft_dist.patches.kv_memory import KVMemory, blocks_for
from peft_dist.patches.paged_cache import PagedCache, PassLayout
from peft_dist.patches.paging import windowed_layers

# Enough for a prefill and decodes; passes that grow token by token (no cache) reuse none.
_MAX_PLANS = 8


@dataclass(frozen=True, slots=True)
class Lengths:
    """What is known of a call of ``generate`` before it runs.

    Attributes:
        prompt: Padded positions of its inputs; None: not known.
        longest: Positions at which it ends at the latest.
    """

    prompt: int | None
    longest: int


class SelectiveCall:
    """Rows of adapters for the forward passes that one call of ``forward`` or ``generate`` makes.

    Args:
        model: The base model as PEFT has changed it.
        row_slots: int32 ``[rows of the call]``, adapter slot of each row, -1 for the base. A pass over k times as
            many rows (beams, returned sequences) repeats each slot k times.
        weights: Stacked weights by layer.
        pages: Whether an empty dynamic cache that Hugging Face brings is to become a paged one.
        lengths: Of a call of ``generate``.
        graphs: Captured decode passes, opened for this call; None runs all passes operator by operator.

    Attributes:
        refusal: Why attention and cache were left to Hugging Face after all, once that is known.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        row_slots: np.ndarray,
        weights: Sequence[LoRALayerWeights | None],
        pages: bool,
        lengths: Lengths | None = None,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self.model = model
        self.row_slots = row_slots
        self.weights = weights
        self.pages = pages
        self.lengths = lengths
        self.graphs = graphs
        self.refusal: str | None = None
        self.caches: list[PagedCache] = []
        self._plans: dict[tuple[int, int], LoRAPlan | None] = {}
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._configs = _attention_configs(model) if pages else []
        self._windowed = windowed_layers(model) if pages else ()
        self._appends_ones = _loops_plainly(model)

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One forward pass of the base model."""
        inputs = _inputs(args, kwargs)
        is_first = not isinstance(kwargs.get(CACHE), PagedCache)
        found = self._paged_cache(kwargs, inputs)
        if found is not None:
            cache, tokens = found
            layout = cache.paged.append(tokens)
            if (output := self._replay(forward, args, kwargs, cache, layout)) is not None:
                return output
            context = self._context(inputs, kwargs)
            context.attention, context.token_rows = cache.paged.metadata(layout)
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

    def _replay(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cache: PagedCache,
        layout: PassLayout,
    ) -> Any | None:
        """The answer of a pass that was captured; None when this one has to run operator by operator."""
        rows, steps = layout.new.shape
        if self.graphs is None or args or steps != 1 or not cache.is_initialized or rows % len(self.row_slots):
            return None
        return self.graphs.run(
            DecodePass(
                forward=forward,
                kwargs=kwargs,
                cache=cache,
                layout=layout,
                row_slots=np.repeat(self.row_slots, rows // len(self.row_slots)),
                weights=self.weights,
                windowed=self._windowed,
                attends=functools.partial(use_paged_attention, self._configs),
            )
        )

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
        kept = getattr(result, CACHE, None)
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

    def _paged_cache(self, kwargs: dict[str, Any], inputs: torch.Tensor) -> tuple[PagedCache, np.ndarray] | None:
        """The paged cache to use in this pass and which inputs are tokens; None leaves both to Hugging Face."""
        cache = kwargs.get(CACHE)
        rows, steps = inputs.shape[:2]
        if isinstance(cache, PagedCache):
            if self._can_page(kwargs):
                if self._appends_tokens(cache, kwargs, rows, steps):
                    return cache, np.ones((rows, 1), bool)
                tokens = _new_tokens(kwargs, rows, steps)
                if tokens.all():
                    return cache, tokens
            cache.release()
        elif self.pages and _is_fresh(cache) and self._can_page(kwargs):
            tokens = _new_tokens(kwargs, rows, steps)
            if _is_left_padded(tokens):
                self.caches.append(PagedCache.adopt(cache, rows, inputs.device, self._memory(rows, inputs.device)))
                return self.caches[-1], tokens
        return None

    def _memory(self, rows: int, device: torch.device) -> KVMemory | None:
        """What the call's own cache is lent; others (of guidance, of assistants) have their own."""
        if self.graphs is None or self.lengths is None or self.caches:
            return None
        config = self.model.config.get_text_config(decoder=True)
        return self.graphs.lend(blocks_for(rows, self.lengths.longest, config, self.model.dtype.itemsize, device))

    def _appends_tokens(self, cache: PagedCache, kwargs: dict[str, Any], rows: int, steps: int) -> bool:
        """Whether each row gets one token, by what is known on the host: the mask need not be brought here.

        Hugging Face's loop appends a one to every row of the mask for each token that it drew.
        """
        mask, length = kwargs.get("attention_mask"), cache.get_seq_length()
        if steps != 1 or self.lengths is None or self.lengths.prompt is None or cache is not self.caches[0]:
            return False
        is_drawn = length >= self.lengths.prompt and self._appends_ones
        return is_drawn and (mask is None or mask.shape == (rows, length + 1))

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


def _loops_plainly(model: PreTrainedModel) -> bool:
    """Whether the loop of ``generate`` makes the inputs of its next pass as Hugging Face's does."""
    names = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    return all(
        name not in model.__dict__ and getattr(type(model), name, None) is getattr(GenerationMixin, name)
        for name in names
    )


def _is_fresh(cache: Any) -> bool:
    return type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0
