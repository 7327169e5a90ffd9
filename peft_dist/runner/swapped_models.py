"""The paper's vLLM baseline: every adapter is a whole merged model, a few of them on the device.

dLoRA (OSDI'24) compares itself with servers that know no adapters: each fine-tune is a model of its own, kept on the
host and swapped in when its requests run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from peft_dist.patches.merged_layers import MergedLayers
from peft_dist.patches.shadow_merger import ShadowMerger
from peft_dist.runner.adapter_tensors import ModuleWeights
from peft_dist.runner.memory import Room, no_limit, reason_against


class SwappedModels:
    """Stands where ``MergeState`` stands. The base is a model too, and always on the device.

    Attributes:
        current: Content hash of the model that passes see; None: the base.
        num_swaps: Models copied from the host.
        host_bytes: What the models' host copies take now.
    """

    way = "models"
    on_device = True
    remedy = "keep fewer resident_models (--resident-models)"

    def __init__(
        self,
        model: nn.Module,
        paths: Collection[str],
        num_resident: int = 2,
        host_budget: int | None = None,
        room: Room = no_limit,
    ) -> None:
        """Nothing is copied yet (``allocate``).

        Args:
            paths: Layers that adapters are expected to target.
            num_resident: Merged models on the device at once, beside the base.
            host_budget: Bytes for copies of models on the host, where the least recently used leave first; None: no
                limit. A model without a copy is made from its adapter again.
            room: As in ``MergeState``.
        """
        self.current: str | None = None
        self.num_swaps = 0
        self.host_bytes = 0
        self._room = room
        self._host_budget = host_budget
        self._idle = [ShadowMerger(model, paths) for _ in range(num_resident)]
        self._resident: OrderedDict[str, ShadowMerger] = OrderedDict()
        self._host: OrderedDict[str, tuple[MergedLayers, int]] = OrderedDict()

    @property
    def _mergers(self) -> list[ShadowMerger]:
        return [*self._idle, *self._resident.values()]

    @property
    def num_bytes(self) -> int:
        """Of the models on the device beside the base, made or yet to be made."""
        return sum(merger.num_bytes for merger in self._mergers)

    @property
    def cannot(self) -> Mapping[str, str]:
        """Why not, by the path of each layer that no adapter can be merged into."""
        return self._mergers[0].cannot

    def more_bytes(self, paths: Iterable[str]) -> int:
        """By how much ``num_bytes`` grows with adapters of these layers too, of those that can be merged into."""
        known = self._mergers[0]
        able = [path for path in paths if known.can_merge([path])]
        return sum(merger.bytes_with(able) - merger.num_bytes for merger in self._mergers)

    def allocate(self) -> None:
        """Take the memory of all resident models now."""
        for merger in self._mergers:
            merger.allocate()

    def reserve(self, paths: Collection[str]) -> str | None:
        """Make room for an adapter of these layers; why it cannot be made a model, None when it can."""
        if reason := self.reason_against(paths):
            return reason
        try:
            for merger in self._mergers:
                merger.expect(paths)
        except (torch.OutOfMemoryError, MemoryError) as error:
            return f"there is no memory for merged models of it ({error}): {self.remedy}"
        return None

    def reason_against(self, paths: Collection[str]) -> str | None:
        """What ``reserve`` would say, as far as that is known before any memory is taken."""
        if reason := self._mergers[0].reason_against(paths):
            return reason
        needed, what = self.more_bytes(paths), f"{len(self._mergers)} merged models"
        return reason_against(needed, self._room, what, self.remedy, on_device=self.on_device)

    def base_weight(self, path: str) -> torch.Tensor:
        """The weight of a layer that can be merged into; the base's are never written."""
        return self._mergers[0].base_weight(path)

    def layers_for_context(self) -> MergedLayers | None:
        return None if self.current is None else self._resident[self.current].layers

    def layers_for_capture(self) -> MergedLayers | None:
        """None: graphs are captured when a model is first on the device."""
        return None

    def holds(self, content_hash: str | None) -> bool:
        """Whether ``switch`` brings this model at no cost: any that is on the device, as the base always is."""
        return content_hash is None or content_hash in self._resident

    def switch(self, content_hash: str | None, weights: Mapping[str, ModuleWeights] | None = None) -> None:
        """Let the passes from here on see a model; ``weights`` make it where the host has no copy of it.

        Raises:
            ValueError: the adapter does not fit the model, or ``weights`` are wanted and not there.
            Exception: whatever else failed. Passes see the base then, or what they saw before.
        """
        if content_hash is not None:
            if content_hash not in self._resident:
                self._bring(content_hash, weights or {})
            self._resident.move_to_end(content_hash)
        self.current = content_hash

    def discard(self, content_hash: str) -> None:
        """An adapter is gone: its host copy goes at once, its place on the device when passes see another model."""
        self._drop_copy(content_hash)
        if content_hash not in self._resident:
            return
        if content_hash == self.current:
            self._resident.move_to_end(content_hash, last=False)
        else:
            self._idle.append(self._resident.pop(content_hash))

    def _bring(self, content_hash: str, weights: Mapping[str, ModuleWeights]) -> None:
        if content_hash not in self._host and not weights:
            raise ValueError(f"adapter {content_hash}: its weights were not given")
        self.current = None
        if not self._idle:
            self._idle.append(self._resident.popitem(last=False)[1])
        # Taken from the idle ones only once it holds the model: a merge can fail.
        merger = self._idle[-1]
        if content_hash in self._host:
            merger.copy_in(self._host[content_hash][0])
            self._host.move_to_end(content_hash)
            self.num_swaps += 1
        else:
            merger.merge({path: (w.A, w.B, w.scaling) for path, w in weights.items()})
            self._keep_copy(content_hash, merger)
        self._resident[content_hash] = self._idle.pop()

    def _keep_copy(self, content_hash: str, merger: ShadowMerger) -> None:
        needed = merger.copy_bytes
        if self._host_budget is not None:
            if needed > self._host_budget:
                return
            while self.host_bytes + needed > self._host_budget:
                self._drop_copy(next(iter(self._host)))
        self._host[content_hash] = (merger.copy_out(), needed)
        self.host_bytes += needed

    def _drop_copy(self, content_hash: str) -> None:
        if held := self._host.pop(content_hash, None):
            self.host_bytes -= held[1]
