"""Host copies of adapters, and the way from there into device slots."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from peft_dist.core.adapter import AdapterSpec
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.patches.lora_layers import join_siblings, wrap_module
from peft_dist.runner.adapter_tensors import LoadedAdapter


class AdapterStore:
    """Adapters of one model by content hash, ready to be copied into slots.

    A module is wrapped in a LoRA layer when the first adapter that targets it arrives, so that a model pays
    only for what its adapters use.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
        self.pool = LoRAPool(device, dtype)
        self._model = model
        self._layers: dict[str, int] = {}
        self._adapters: dict[str, LoadedAdapter] = {}

    def add(self, adapter: LoadedAdapter) -> None:
        """Keep a checked adapter. Adding the same content again changes nothing."""
        if adapter.spec.content_hash not in self._adapters:
            if any([self._wrap(path) for path in adapter.weights]):  # noqa: C419 (all of them, not up to the first)
                join_siblings(self._model)
            self._adapters[adapter.spec.content_hash] = adapter

    def remove(self, content_hash: str) -> None:
        self._adapters.pop(content_hash, None)

    def fill_slot(self, spec: AdapterSpec, slot: int) -> None:
        """Copy an adapter that was added into a device slot."""
        weights = self._adapters[spec.content_hash].weights
        self.pool.load(slot, {self._layers[path]: (w.A, w.B, w.scaling) for path, w in weights.items()})

    def _wrap(self, path: str) -> bool:
        """Whether the module is wrapped for the first time."""
        if path in self._layers:
            return False
        layer = wrap_module(self._model, path)
        layer.lora_index = self.pool.add_layer(
            layer.in_features, layer.out_features, embedding=isinstance(layer.base_layer, torch.nn.Embedding)
        )
        self._layers[path] = layer.lora_index
        return True
