"""The weights that PEFT's layers hold now, copied into the slots that the kernels read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

from peft_dist.kernels.lora_pool import LayerTensors, LoRAPool
from peft_dist.patches.lora_layers import SelectiveEmbedding, SelectiveLayer


class LiveWeights:
    """Owns one patched model's LoRAPool and refills it before every call.

    Refilling is unconditional: writes through ``.data`` leave no trace (neither the version counter nor the
    address of a tensor changes), so nothing cheaper than copying sees all of them.

    Attributes:
        slots: Slot of each adapter that was used before and still exists.
    """

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}
        self._pool: LoRAPool | None = None
        self._key: object = None

    def refresh(
        self,
        layers: Sequence[SelectiveLayer],
        weights: Mapping[str, Mapping[int, LayerTensors]],
        known: Collection[str],
    ) -> LoRAPool:
        """Copy these adapters' weights (by name and layer number); slots of unknown adapters are freed."""
        # What inference mode makes is closed to all later calls that run without it.
        with torch.inference_mode(False), torch.no_grad():
            return self._refresh(layers, weights, known)

    def _refresh(
        self,
        layers: Sequence[SelectiveLayer],
        weights: Mapping[str, Mapping[int, LayerTensors]],
        known: Collection[str],
    ) -> LoRAPool:
        pool = self._fitting_pool(layers, _common_dtype(weights))
        for index, layer in enumerate(layers):
            # Written past nn.Module.__setattr__, which costs more than everything else in this loop.
            layer.__dict__["lora_index"] = index
            layer.__dict__.pop("embed_factor", None)
        for name in sorted(set(self.slots) - set(known)):
            pool.drop(self.slots.pop(name))
        for name in sorted(weights):
            slot = self.slots.setdefault(name, self._free_slot())
            pool.load(slot, weights[name])
        return pool

    def _free_slot(self) -> int:
        taken = set(self.slots.values())
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def _fitting_pool(self, layers: Sequence[SelectiveLayer], dtype: torch.dtype | None) -> LoRAPool:
        """The pool when it still fits the layers and the dtype (None: any), else a new, empty one."""
        shapes = [(layer.in_features, layer.out_features) for layer in layers]
        device = layers[0].get_base_layer().weight.device if layers else torch.device("cpu")
        pool = self._pool
        if pool is None or self._key != (shapes, device) or dtype not in (None, pool.dtype):
            pool = LoRAPool(device, dtype or torch.float32, grows_tables=device.type != "cpu")
            for layer in layers:
                is_embedding = isinstance(layer, SelectiveEmbedding)
                pool.add_layer(layer.in_features, layer.out_features, embedding=is_embedding)
            self._pool, self._key, self.slots = pool, (shapes, device), {}
        return pool


def _common_dtype(weights: Mapping[str, Mapping[int, LayerTensors]]) -> torch.dtype | None:
    """The one dtype of all tensors, float32 when there are several, None when there are no tensors."""
    tensors = (tensor for layers in weights.values() for A, B, _ in layers.values() for tensor in (A, B))
    dtypes = {tensor.dtype for tensor in tensors}
    if not dtypes:
        return None
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
