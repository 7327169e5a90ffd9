"""Decode passes of ``generate`` as one replayed capture each: Hugging Face loops, the device does not wait for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.utils import ModelOutput

from peft_dist.forward_context import ForwardContext
from peft_dist.kernels.capture import Capture, CudaCapture, NotCapturableError, refuse_waiting
from peft_dist.kernels.types import LoRALayerWeights
from peft_dist.patches.cache_name import CACHE
from peft_dist.patches.capturable import HandThroughCache, UnreadMask
from peft_dist.patches.decode_inputs import DecodeInputs, table_width, tile_shape
from peft_dist.patches.kv_memory import KVMemory
from peft_dist.patches.paged_cache import PagedCache, PassLayout

logger = logging.getLogger("peft_dist.patches")

_MOST_GRAPHS = 16
_READ_FROM_BUFFERS = ("input_ids", "position_ids", "attention_mask", CACHE)
# Settings of a pass that say nothing of its inputs; those that ask for other outputs must not be set.
_SETTINGS = {"use_cache", "return_dict", "logits_to_keep"}
_UNSET = {"output_attentions", "output_hidden_states", "output_router_logits"}


def capture_for(device: torch.device) -> Capture | None:
    """What captures on this device; None where nothing does."""
    if device.type != "cuda":
        return None
    capture = CudaCapture(device)

    def checked(run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(device):
            refuse_waiting(run)
            return capture(run)

    return checked


@dataclass(slots=True)
class DecodePass:
    """One pass over one new token in every row.

    Attributes:
        forward: The model's own.
        kwargs: What Hugging Face calls it with.
        cache: The call's paged cache, to which the tokens were appended already.
        layout: Where they stand.
        row_slots: int32 ``[rows]``.
        weights: Adapters by layer.
        windowed: As in ``ForwardContext``.
        attends: Makes the attention modules run paged attention while it is entered.
    """

    forward: Callable[..., Any]
    kwargs: Mapping[str, Any]
    cache: PagedCache
    layout: PassLayout
    row_slots: np.ndarray
    weights: Sequence[LoRALayerWeights | None]
    windowed: Any
    attends: Callable[[], AbstractContextManager[None]]


@dataclass(slots=True)
class _Captured:
    inputs: DecodeInputs
    replay: Callable[[], None]
    outputs: list[ModelOutput]
    """One: what the function left when it ran last, or when it was recorded."""


class DecodeGraphs:
    """The captured passes of one model, and the KV memory that they write to, kept from call to call.

    Both are good for one state of the model (``open``). Memory that moves makes every capture worthless.

    Attributes:
        memory: What a call was lent last; graphs serve the caches that lie in it.
    """

    def __init__(self, make_capture: Callable[[torch.device], Capture | None]) -> None:
        self.memory: KVMemory | None = None
        self._make_capture = make_capture
        self._capture: Capture | None = None
        self._captured: dict[object, _Captured] = {}
        self._refused: set[object] = set()
        self._state: object = None
        self._version = 0

    @property
    def num_graphs(self) -> int:
        """Captured passes that can be replayed now."""
        return len(self._captured)

    def can_capture(self, device: torch.device) -> bool:
        """Whether anything can be captured there."""
        if self._capture is None:
            self._capture = self._make_capture(device)
        return self._capture is not None

    def open(self, state: object) -> None:
        """Begin a call; what was captured in another state is dropped."""
        if state != self._state:
            self._drop()
            self._state = state

    def lend(self, num_blocks: int) -> KVMemory:
        """Memory of at least so many blocks for one cache, whatever is in it: the last one where it suffices."""
        if self.memory is None or self.memory.num_blocks < num_blocks:
            self._drop()
            # Before the new one is made: there may be no room for both.
            self.memory = None
            self.memory = KVMemory(num_blocks)
        return self.memory

    def close(self) -> None:
        """End a call; memory is kept unless it is too much."""
        if self.memory is not None and not self.memory.may_be_kept:
            self.clear()

    def clear(self) -> None:
        """Give everything back."""
        self._drop()
        self.memory = self._state = None

    def run(self, step: DecodePass) -> ModelOutput | None:
        """What the pass answers; None when it has to run operator by operator."""
        memory = step.cache.paged.memory
        settings = settings_of(step.kwargs)
        if memory is not self.memory or settings is None or torch.is_grad_enabled():
            return None
        if memory.version != self._version:
            self._drop()
            self._version = memory.version
        key = _key(step, settings)
        if key in self._refused:
            return None
        captured = self._captured.get(key) or self._new(key, step, settings)
        if captured is None:
            return None
        captured.inputs.fill(step.kwargs["input_ids"], step.kwargs["position_ids"], step.layout, step.row_slots)
        captured.replay()
        step.cache.advance(1)
        return _copy_output(captured.outputs[0], step.cache)

    def _new(self, key: object, step: DecodePass, settings: Mapping[str, Any]) -> _Captured | None:
        if len(self._captured) >= _MOST_GRAPHS:
            self._drop()
        try:
            captured = self._captured[key] = self._build(step, settings)
        except RuntimeError as error:
            # Whatever cannot be captured runs as it did before, and there a real error comes again.
            logger.info("decode passes are not captured: %s", error)
            self._refused.add(key)
            if not self._captured:
                # Memory of a capture that failed belongs to no graph, and a pool of no graph cannot be used again.
                self._capture = None
            return None
        return captured

    def _build(self, step: DecodePass, settings: Mapping[str, Any]) -> _Captured:
        kwargs = step.kwargs
        inputs = DecodeInputs(kwargs["input_ids"], kwargs["position_ids"], *_sizes(step))
        inputs.fill(kwargs["input_ids"], kwargs["position_ids"], step.layout, step.row_slots)
        arguments = {**settings, "input_ids": inputs.ids, "position_ids": inputs.positions}
        arguments[CACHE] = HandThroughCache(step.cache.layers)
        if kwargs.get("attention_mask") is not None:
            arguments["attention_mask"] = UnreadMask.like(kwargs["attention_mask"])
        caches, outputs = step.cache.paged.caches, list[Any]()

        def run() -> None:
            plan = inputs.plan()
            context = ForwardContext(
                attention=inputs.metadata(),
                kv_caches=caches,
                lora=plan,
                lora_logits=plan,
                lora_weights=step.weights,
                windowed=step.windowed,
            )
            with context, step.attends():
                outputs[:] = [step.forward(**arguments)]

        if not self.can_capture(inputs.ids.device) or self._capture is None:
            raise NotCapturableError(f"nothing captures on {inputs.ids.device}")
        replay = self._capture(run)
        _check_output(outputs[0])
        return _Captured(inputs, replay, outputs)

    def _drop(self) -> None:
        self._captured.clear()
        self._refused.clear()
        self._capture = None


def settings_of(kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a pass is called with besides its inputs; None when it is no plain decode pass."""
    ids, positions = kwargs.get("input_ids"), kwargs.get("position_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
        return None
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or positions.device != ids.device:
        return None
    rest = {name: value for name, value in kwargs.items() if name not in _READ_FROM_BUFFERS and value is not None}
    if any(not isinstance(value, (bool, int)) or (name in _UNSET and value) for name, value in rest.items()):
        return None
    if rest.keys() - _SETTINGS - _UNSET or not rest.get("return_dict", True) or not rest.get("use_cache", True):
        return None
    return rest


def _sizes(step: DecodePass) -> tuple[int, tuple[int, int] | None]:
    """Of the step's buffers: columns of the block tables, and tiles."""
    tiles = tile_shape(step.row_slots) if (step.row_slots >= 0).any() else None
    return table_width(step.layout.tables.shape[1]), tiles


def _key(step: DecodePass, settings: Mapping[str, Any]) -> object:
    ids, positions = step.kwargs["input_ids"], step.kwargs["position_ids"]
    return (
        (ids.shape, ids.dtype, ids.device, positions.shape, positions.dtype),
        step.kwargs.get("attention_mask") is not None,
        tuple(sorted(settings.items())),
        _sizes(step),
        tuple(weights is None for weights in step.weights),
    )


def _check_output(output: Any) -> None:
    if not isinstance(output, ModelOutput):
        raise NotCapturableError(f"the model answers with a {type(output).__name__}")
    for name, value in output.items():
        if not isinstance(value, (torch.Tensor, HandThroughCache)):
            raise NotCapturableError(f"the model answers with {name}, a {type(value).__name__}")


def _copy_output(output: ModelOutput, cache: PagedCache) -> ModelOutput:
    """The same with tensors that the next replay does not write to."""
    fields = {name: value.clone() if isinstance(value, torch.Tensor) else cache for name, value in output.items()}
    return type(output)(**fields)
