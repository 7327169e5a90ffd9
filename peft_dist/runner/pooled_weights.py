"""What a slot of the LoRA pool holds, as a mapping that is read only where somebody looks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peft_dist.kernels.pooled_adapter import PooledAdapter
from peft_dist.runner.adapter_tensors import ModuleWeights


class PooledWeights(Mapping[str, ModuleWeights]):
    """By module path; each look makes new copies, on the pool's device and in its dtype."""

    def __init__(self, adapter: PooledAdapter, layers: Mapping[str, int]) -> None:
        """``layers``: ``lora_index`` by path, of every layer of the pool."""
        self.adapter = adapter
        self._layers = layers

    def __getitem__(self, path: str) -> ModuleWeights:
        index = self._layers[path]
        if index not in self.adapter.ranks:
            raise KeyError(path)
        return ModuleWeights(*self.adapter.pool.read_layer(self.adapter.slot, index))

    def __iter__(self) -> Iterator[str]:
        return map(self.adapter.paths.__getitem__, self.adapter.ranks)

    def __len__(self) -> int:
        return len(self.adapter.ranks)
