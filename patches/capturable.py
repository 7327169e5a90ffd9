"""Which models' decode passes can be recorded once and replayed, and what such a pass must not look at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import DynamicCache, PreTrainedModel

from peft_dist.kernels.capture import NotCapturableError
from peft_dist.kernels.types import LoRALayerWeights
from peft_dist.patches.lora_layers import SelectiveEmbedding

# They compute with the length of the longest row, on the host.
_ROPES_BY_LENGTH = {"dynamic", "longrope"}
# Its hooks do nothing unless hidden states or attention weights are wanted, which no captured pass returns.
_IDLE_HOOKS = "transformers.utils.output_capturing"


def capture_reason(model: PreTrainedModel, weights: list[LoRALayerWeights | None]) -> str | None:
    """Why the decode passes of this model, as it is now, have to run operator by operator; None: they need not."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "global forward hooks are registered"
    for module in _modules(model):
        if reason := _module_reason(module, model, weights):
            return f"{type(module).__name__} {reason}"
    return None


def model_state(model: PreTrainedModel) -> tuple[object, ...]:
    """Equal as long as the model's code, its configuration and the addresses of its tensors are the same."""
    state: list[object] = [model.config.to_json_string(use_diff=False)]
    for module in _modules(model):
        state += (type(module), type(module).forward)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                state += (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
    return (*state, *_math_settings())


def _math_settings() -> tuple[object, ...]:
    """What chooses torch's kernels for products; ``get_float32_matmul_precision`` raises after some of the setters."""
    matmul = torch.backends.cuda.matmul
    return (
        getattr(torch.backends, "fp32_precision", None),
        getattr(matmul, "fp32_precision", None),
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """All that compute outside of the adapters, whose weights are copied before each call."""
    yield module
    if isinstance(module, BaseTunerLayer):
        yield from _modules(module.get_base_layer())
    else:
        for child in module.children():
            yield from _modules(child)


def _module_reason(module: nn.Module, model: PreTrainedModel, weights: list[LoRALayerWeights | None]) -> str | None:
    if module.training:
        return "is in training mode"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if module is not model and any(getattr(hook, "__module__", None) != _IDLE_HOOKS for hook in hooks):
        return "has forward hooks"
    rope: Any = getattr(module, "rope_type", None)
    if _ROPES_BY_LENGTH & set(rope.values() if isinstance(rope, dict) else [rope]):
        return "has a rotary embedding that changes with the length"
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and (type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device != model.device):
            return f"has a {type(tensor).__name__} on {tensor.device}"
    if isinstance(module, SelectiveEmbedding) and model.device.type != "cpu" and weights[module.lora_index] is not None:
        return "has adapters, for which there is no kernel that can be captured"
    return None


class HandThroughCache(DynamicCache):
    """Stands for a paged cache in a captured pass: keys and values go through, lengths are not to be had.

    Args:
        layers: The cache's, in which nothing was ever stored; they tell of which kinds they are.
    """

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand one layer's new keys and values through."""
        return key_states, value_states

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise NotCapturableError("the model asks its cache for what changes with every step (a length, or rows)")

    get_seq_length = get_mask_sizes = get_query_offset = crop = reset = reorder_cache = _refuse
    batch_select_indices = batch_repeat_interleave = _refuse
    batch_size = is_initialized = property(_refuse)

    def __getattr__(self, name: str) -> Any:
        raise NotCapturableError(f"the model asks its cache for {name!r}, which may change with every step")


class UnreadMask(torch.Tensor):
    """Stands for the attention mask in a captured pass: there is one, with two dimensions, and nobody reads it."""

    _ALLOWED = frozenset(
        {
            torch.Tensor.dim,
            torch.Tensor.view,
            torch.Tensor.shape.__get__,
            torch.Tensor.ndim.__get__,
            torch.Tensor.device.__get__,
            torch.Tensor.dtype.__get__,
        }
    )

    @classmethod
    def like(cls, mask: torch.Tensor) -> UnreadMask:
        """One column of the mask, of which only rows, type and device are known."""
        return torch.ones(len(mask), 1, dtype=mask.dtype, device=mask.device).as_subclass(cls)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in cls._ALLOWED:
            raise NotCapturableError("the model reads its attention mask, which changes with every step")
        return super().__torch_function__(func, types, args, kwargs)
