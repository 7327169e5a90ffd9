"""Which adapters a model can get, where their files are, and what is kept of them on host and device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import AdapterError
from peft_dist.kernels.lora_pool import LayerTensors, LoRAPool
from peft_dist.kernels.pooled_adapter import PooledAdapter
from peft_dist.kernels.threads import one_thread
from peft_dist.patches.lora_layers import SelectiveLayer, join_siblings
from peft_dist.patches.lora_wrapping import make_layer, wrap_module
from peft_dist.runner.adapter_modules import ModuleShape
from peft_dist.runner.adapter_tensors import LoadedAdapter, ModuleWeights, inspect_adapter, load_adapter
from peft_dist.runner.adapter_weights import in_one_buffer
from peft_dist.runner.host_tier import HostTier
from peft_dist.runner.pooled_weights import PooledWeights


@dataclass(frozen=True, slots=True)
class _Source:
    """Where one registration found the content."""

    name: str
    path: Path
    allow_pickle: bool


class AdapterStore:
    """Adapters of one model by content hash: registered (on disk), copied to the host, in slots of the pool.

    A module is wrapped in a LoRA layer when the first adapter that targets it is registered, so that a model pays
    only for what its adapters use. ``read`` is for loader threads, ``inspect`` for any, all else for the engine's.
    """

    def __init__(
        self, model: PreTrainedModel, modules: Mapping[str, ModuleShape], pool: LoRAPool, host_memory: int
    ) -> None:
        """
        Args:
            modules: The model as adapters' files describe it: before it was wrapped or split over ranks.
            host_memory: Bytes.
        """
        self.pool = pool
        self.host = HostTier(host_memory)
        self._model = model
        self._modules = modules
        self._layers: dict[str, int] = {}
        self._paths: dict[int, str] = {}
        self._made: dict[str, SelectiveLayer] = {}
        self._sources: dict[str, list[_Source]] = {}
        self._specs: dict[str, AdapterSpec] = {}

    @property
    def specs(self) -> list[AdapterSpec]:
        """Of the adapters that can be loaded, by the name they were registered under last."""
        return list(self._specs.values())

    @property
    def num_layers(self) -> int:
        """Modules that registered adapters have wrapped so far; it never falls."""
        return len(self._layers)

    @property
    def registered(self) -> list[str]:
        """Content hashes that can be loaded."""
        return list(self._sources)

    def inspect(self, name: str, path: Path, *, allow_pickle: bool) -> AdapterSpec:
        """Check an adapter whole and tell its identity; nothing of it is kept. For any thread.

        Layers for modules that no adapter targets yet are made here, so that ``register`` has only to put them in.

        Raises:
            AdapterError: it cannot be served.
        """
        with one_thread():
            spec = inspect_adapter(name, path, self._modules, allow_pickle=allow_pickle)
        for module_path in spec.ranks:
            if module_path not in self._layers and module_path not in self._made:
                self._made[module_path] = make_layer(self._model, module_path)
        return spec

    def register(self, spec: AdapterSpec, *, allow_pickle: bool) -> None:
        """Remember where an adapter that ``inspect`` found good is, and ready the model for it."""
        if any([self._wrap(path) for path in spec.ranks]):  # noqa: C419 (all of them, not up to the first)
            join_siblings(self._model)
        source = _Source(spec.name, Path(spec.path), allow_pickle)
        sources = self._sources.setdefault(spec.content_hash, [])
        if source in sources:
            sources.remove(source)
        sources.append(source)
        self._specs[spec.content_hash] = spec

    def remove(self, content_hash: str) -> None:
        """Forget a registration and the host copy."""
        self._sources.pop(content_hash, None)
        self._specs.pop(content_hash, None)
        self.host.remove(content_hash)

    def sources(self, spec: AdapterSpec) -> list[_Source]:
        """Where the content was found, the latest first; to be given to ``read``."""
        return self._sources[spec.content_hash][::-1]

    def read(self, spec: AdapterSpec, sources: list[_Source]) -> LoadedAdapter:
        """Read a registered adapter again, from the first source that still has its content.

        Raises:
            AdapterError: none has; the message is that of the first.
        """
        problem: AdapterError | None = None
        for source in sources:
            try:
                return self._read(spec, source)
            except AdapterError as error:
                problem = problem or error
        assert problem is not None, "a registered adapter comes from somewhere"
        raise problem

    def ranks(self, spec: AdapterSpec) -> dict[int, int]:
        """By ``lora_index``."""
        return {self._layers[path]: rank for path, rank in spec.ranks.items()}

    def layer_tensors(self, adapter: LoadedAdapter) -> dict[int, LayerTensors]:
        """What the pool takes."""
        return {self._layers[path]: (w.A, w.B, w.scaling) for path, w in adapter.weights.items()}

    def weights_in(self, slot: int) -> PooledWeights:
        """What a slot of the pool holds, by module path; on the pool's device and in its dtype."""
        return PooledWeights(PooledAdapter(self.pool, slot, self._paths), self._layers)

    def keep(self, content_hash: str, slot: int | None) -> None:
        """Keep the weights in host memory beyond the budget, from the host's copy or the slot, until they are released.

        A GPU copies them behind what runs on its current stream; nobody but a load may read them.
        """
        if not self.host.keep(content_hash) and slot is not None:
            adapter = LoadedAdapter(self._specs[content_hash], _to_host(dict(self.weights_in(slot))))
            self.host.keep(content_hash, adapter)

    def _read(self, spec: AdapterSpec, source: _Source) -> LoadedAdapter:
        adapter = load_adapter(
            source.name,
            source.path,
            self._modules,
            allow_pickle=source.allow_pickle,
            # The only memory from which a GPU copies while the host goes on.
            pin_memory=self.pool.device.type == "cuda",
        )
        if adapter.spec.content_hash != spec.content_hash:
            raise AdapterError(
                f"adapter {source.name!r} in {source.path}: its files have changed since it was loaded, and the old "
                "weights are not in memory: load it again in place, and give new weights a folder of their own"
            )
        return self._own_part(adapter)

    def _own_part(self, adapter: LoadedAdapter) -> LoadedAdapter:
        """What this process has of it, where the model is split over ranks: copies, so that the rest is freed."""
        parts = {path: part for path in adapter.weights if (part := self._modules[path].part) is not None}
        if not parts:
            return adapter
        tensors = {}
        for path, w in adapter.weights.items():
            pair = parts[path].of_adapter(w.A, w.B) if path in parts else (w.A, w.B)
            tensors[f"{path}.A"], tensors[f"{path}.B"] = pair
        kept = in_one_buffer(tensors, pin_memory=self.pool.device.type == "cuda")
        weights = {
            path: ModuleWeights(kept[f"{path}.A"], kept[f"{path}.B"], w.scaling) for path, w in adapter.weights.items()
        }
        return LoadedAdapter(adapter.spec, weights)

    def _wrap(self, path: str) -> bool:
        """Whether the module is wrapped for the first time."""
        if path in self._layers:
            return False
        layer = wrap_module(self._model, path, self._made.pop(path, None))
        layer.lora_index = self.pool.add_layer(
            layer.in_features, layer.out_features, embedding=isinstance(layer.base_layer, torch.nn.Embedding)
        )
        self._layers[path] = layer.lora_index
        self._paths[layer.lora_index] = path
        return True


def _to_host(weights: dict[str, ModuleWeights]) -> dict[str, ModuleWeights]:
    """Copies in one buffer: pinned memory is dear to set aside piece by piece."""
    tensors = [tensor for w in weights.values() for tensor in (w.A, w.B)]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    if flat.is_cuda:
        flat = torch.empty_like(flat, device="cpu", pin_memory=True).copy_(flat, non_blocking=True)
    parts = iter(flat.split([tensor.numel() for tensor in tensors]))
    return {
        path: ModuleWeights(next(parts).view(w.A.shape), next(parts).view(w.B.shape), w.scaling)
        for path, w in weights.items()
    }
