"""One adapter folded into the weights, so that its requests run at the base's speed.

Nothing is ever subtracted: bfloat16 weights that an adapter was added to and taken from again drift with each switch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import nn

from peft_dist.kernels.lora_pool import LayerTensors
from peft_dist.kernels.pooled_adapter import PooledAdapter
from peft_dist.patches.merge_sites import MergeSites, find_sites, oriented
from peft_dist.patches.merged_layers import MergedLayers


class Merger(ABC):
    """Merges one adapter at a time into a model, and brings the base back bit for bit.

    On a GPU all work is put onto streams so that it is ordered with what runs on the current one: forward passes that
    were started before still see the old weights, those started afterwards the new. The host waits for nothing.

    Attributes:
        way: Its name.
        on_device: The bytes of ``num_bytes`` are the model's device's, not the host's.
        cannot: Why not, by the path of each layer that no adapter can be merged into.
        is_merged: Whether passes see an adapter's weights now.
    """

    way: ClassVar[str]
    on_device: bool

    def __init__(self, model: nn.Module, paths: Iterable[str] = (), exclusive: bool = False) -> None:
        """Look at the model; nothing is copied yet.

        Args:
            paths: Layers that adapters are expected to target, for ``num_bytes`` and ``allocate``. Those that cannot
                be merged into are passed over; others join when an adapter brings them.
            exclusive: A weight that two modules share cannot be merged into.
        """
        self._model = model
        self._sites: MergeSites = find_sites(model, exclusive)
        self.cannot: dict[str, str] = dict(self._sites.cannot)
        self.is_merged = False
        # Layers whose second copies are counted: those that adapters are expected to target, or did.
        known = [self._sites.modules[path] for path in paths if path in self._sites.modules]
        self._modules: dict[nn.Module, None] = dict.fromkeys(known)

    def can_merge(self, paths: Iterable[str]) -> bool:
        """Whether an adapter of these layers can be merged: into all of them, or not at all."""
        return self.reason_against(paths) is None

    def reason_against(self, paths: Iterable[str]) -> str | None:
        """Names the first of these layers that cannot be merged into, and why; None when all can."""
        for path in paths:
            if reason := self._sites.reason_against(path):
                return f"{path} cannot be merged: {reason}"
        return None

    def knows(self, paths: Iterable[str]) -> bool:
        """Whether the second copies of all these layers are made, or counted already."""
        modules = self._sites.modules
        return all(modules.get(path) in self._modules for path in paths)

    @property
    def num_bytes(self) -> int:
        """Bytes that the second copies take, or will take once they are made: of the layers known so far."""
        return self.bytes_with(())

    @abstractmethod
    def bytes_with(self, paths: Iterable[str]) -> int:
        """``num_bytes`` if adapters of these layers were merged too."""

    @abstractmethod
    def allocate(self) -> None:
        """Make the second copies of all layers known so far now, not at the first merge."""

    def expect(self, paths: Iterable[str]) -> None:
        """Make the second copies of further layers, of which adapters will be merged.

        Raises:
            ValueError: one of them cannot be merged into; nothing has changed.
            Exception: whatever made a copy fail (memory); the layers are as unknown as before.
        """
        new = dict.fromkeys(module for path in paths if (module := self._site(path)) not in self._modules)
        self._modules.update(new)
        try:
            self.allocate()
        except BaseException:
            for module in new:
                del self._modules[module]
            raise

    def base_weight(self, path: str) -> torch.Tensor:
        """The weight of a layer that can be merged into, as it is without adapters. For any thread."""
        return weight_of(self._site(path))

    @property
    @abstractmethod
    def layers(self) -> MergedLayers | None:
        """For ``ForwardContext.merged``; None where modules' own weights are right."""

    @abstractmethod
    def merge(self, adapter: Mapping[str, LayerTensors]) -> None:
        """Fold an adapter into the base, whatever was merged before.

        Args:
            adapter: PEFT's A, B and scaling by the layer's path in the model, on any device.

        Raises:
            ValueError: a layer cannot be merged or a tensor does not fit it; nothing has changed.
            Exception: whatever else failed (memory); the model computes the base's outputs then, bit for bit.
        """

    def merge_pooled(self, adapter: PooledAdapter) -> bool:
        """``merge`` of an adapter where it lies on the device; False, with nothing changed, where that takes copies.

        Raises:
            Exception: whatever failed; the model computes the base's outputs then, bit for bit.
        """
        return False

    @abstractmethod
    def unmerge(self) -> None:
        """Bring the base back. Does nothing where nothing is merged."""

    @abstractmethod
    def resume(self) -> bool:
        """Merge what was merged last again, if that costs nothing; False where it takes a ``merge``."""

    def _site(self, path: str) -> nn.Module:
        if reason := self.reason_against([path]):
            raise ValueError(reason)
        return self._sites.modules[path]

    def _checked(self, adapter: Mapping[str, LayerTensors]) -> dict[nn.Module, LayerTensors]:
        """A and B oriented as the weight, by base layer. Raises ValueError when one does not fit."""
        found = {}
        for path, tensors in adapter.items():
            module = self._site(path)
            A, B, scaling = oriented(module, tensors)
            shape = tuple(weight_of(module).shape)
            if A.dim() != 2 or B.dim() != 2 or (len(B), A.shape[1]) != shape or len(A) != B.shape[1]:
                sizes = f"A {list(tensors[0].shape)} and B {list(tensors[1].shape)}"
                raise ValueError(f"{path} with a weight of {list(shape)} cannot take {sizes}")
            found[module] = (A, B, scaling)
        return found


def weight_of(module: nn.Module) -> torch.Tensor:
    weight = module._parameters["weight"]
    assert weight is not None, "sites have a weight"
    return weight
