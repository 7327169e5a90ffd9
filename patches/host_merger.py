"""Merging in place, with copies of the base's weights in host memory to restore them from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from peft_dist.kernels.lora_pool import LayerTensors
from peft_dist.kernels.merge import MergeItem, merge_group_
from peft_dist.kernels.pinned import pinned_bytes
from peft_dist.patches.merged_layers import MergedLayers
from peft_dist.patches.merging import Merger, weight_of
from peft_dist.patches.packed_linear import packing_of


class HostMerger(Merger):
    """Merged weights in the base's own memory: takes none of the device's, but each switch moves weights.

    The copies are pinned on a GPU (whose allocator rounds each up to a power of two), and go back on a stream of
    their own, layer by layer: while one is merged, the next is on its way.
    """

    way = "host"

    def __init__(self, model: nn.Module, paths: Iterable[str] = ()) -> None:
        super().__init__(model, paths, exclusive=True)
        self.on_device = not any(weight_of(module).is_cuda for module in self._sites.modules.values())
        self._copies: dict[nn.Module, torch.Tensor] = {}
        # Layers whose weight may be something else than the base's.
        self._touched: set[nn.Module] = set()
        self._stream: torch.cuda.Stream | None = None

    @property
    def layers(self) -> MergedLayers | None:
        return None

    def bytes_with(self, paths: Iterable[str]) -> int:
        modules = dict(self._modules) | dict.fromkeys(self._site(path) for path in paths)
        weights = [weight_of(module) for module in modules]
        return sum(pinned_bytes(weight.nbytes) if weight.is_cuda else weight.nbytes for weight in weights)

    @torch.no_grad()
    def allocate(self) -> None:
        for module in self._modules:
            if module not in self._copies:
                assert module not in self._touched, "a layer is copied before it is written"
                weight = weight_of(module)
                copy = torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda)
                self._copies[module] = copy.copy_(weight)

    def base_weight(self, path: str) -> torch.Tensor:
        module = self._site(path)
        return self._copies.get(module, weight_of(module))

    def merge(self, adapter: Mapping[str, LayerTensors]) -> None:
        checked = self._checked(adapter)
        self.is_merged = False
        try:
            # In inference mode, which may write weights that were loaded in it, and others too.
            with torch.inference_mode():
                tensors = {module: self._on_device(module, t) for module, t in checked.items()}
                self._modules.update(dict.fromkeys(tensors))
                self.allocate()
                stale = self._touched.difference(tensors)
                self._merge_in_place(tensors)
                self._restore(stale)
                self._touched.difference_update(stale)
                _pack_again([*tensors, *stale])
        except BaseException:
            self._restore_all()
            raise
        self.is_merged = True

    def unmerge(self) -> None:
        self.is_merged = False
        self._restore_all()

    def resume(self) -> bool:
        return False

    def _merge_in_place(self, tensors: Mapping[nn.Module, LayerTensors]) -> None:
        again = self._touched.intersection(tensors)
        self._touched.update(tensors)
        on_cpu = [m for m in tensors if not weight_of(m).is_cuda]
        merge_group_([MergeItem(weight_of(m), self._copies[m], *tensors[m]) for m in on_cpu])
        first = [m for m in tensors if weight_of(m).is_cuda and m not in again]
        merge_group_([MergeItem(weight_of(m), weight_of(m), *tensors[m]) for m in first])
        restored = self._send_back([m for m in tensors if weight_of(m).is_cuda and m in again])
        for module, arrived in restored.items():
            arrived.wait()
            weight = weight_of(module)
            merge_group_([MergeItem(weight, weight, *tensors[module])])

    def _restore_all(self) -> None:
        touched = set(self._touched)
        with torch.inference_mode():
            self._restore(touched)
            self._touched.clear()
            _pack_again(touched)

    def _restore(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        for module in modules:
            if not weight_of(module).is_cuda:
                weight_of(module).copy_(self._copies[module])
        for arrived in self._send_back([m for m in modules if weight_of(m).is_cuda]).values():
            arrived.wait()

    def _send_back(self, modules: list[nn.Module]) -> dict[nn.Module, torch.cuda.Event]:
        """Start copying weights back to a GPU; events say when each has arrived, for the current stream to wait."""
        if not modules:
            return {}
        device = weight_of(modules[0]).device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        # What was started before may still read the weights.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        arrived = {}
        with torch.cuda.stream(self._stream):
            for module in modules:
                weight_of(module).copy_(self._copies[module], non_blocking=True)
                arrived[module] = self._stream.record_event()
        return arrived

    @staticmethod
    def _on_device(module: nn.Module, tensors: LayerTensors) -> LayerTensors:
        """Moved before the first weight is written, as this can run out of memory."""
        A, B, scaling = tensors
        device = weight_of(module).device
        A, B = (t.to(device, torch.float32, non_blocking=True) if device.type == "cuda" else t for t in (A, B))
        return A, B, scaling


def _pack_again(modules: Iterable[nn.Module]) -> None:
    for packing in {packing: None for module in modules if (packing := packing_of(module))}:
        packing.refresh()
