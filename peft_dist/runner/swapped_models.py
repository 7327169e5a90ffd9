"""The paper's vLLM baseline: every adapter is a whole merged model, a few of them on the device.

dLoRA (OSDI'24) compares itself with servers that know no adapters: each fine-tune is a model of its own, kept on the
host and swapped in when its requests run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping

from torch import nn

from peft_dist.patches.merged_layers import MergedLayers
from peft_dist.patches.shadow_merger import ShadowMerger
from peft_dist.runner.adapter_tensors import ModuleWeights


class SwappedModels:
    """Stands where ``MergeState`` stands. The base is a model too, and always on the device.

    Attributes:
        current: Content hash of the model that passes see; None: the base.
        num_swaps: Models copied from the host.
    """

    way = "models"

    def __init__(self, model: nn.Module, paths: Collection[str], num_resident: int = 2) -> None:
        """``num_resident``: Merged models on the device at once, beside the base."""
        self.current: str | None = None
        self.num_swaps = 0
        self._num_resident = num_resident
        self._model = model
        self._paths = paths
        self._resident: OrderedDict[str, ShadowMerger] = OrderedDict()
        self._host: dict[str, MergedLayers] = {}
        self._probe = ShadowMerger(model, paths)

    @property
    def num_bytes(self) -> int:
        """Of the models on the device beside the base."""
        return self._num_resident * self._probe.num_bytes

    @property
    def device_bytes(self) -> int:
        return self.num_bytes

    @property
    def held(self) -> str | None:
        """A model that ``switch`` brings at no cost (any resident one does; the latest is named)."""
        return next(reversed(self._resident), None)

    def mergeable(self, paths: Collection[str]) -> str | None:
        """Why an adapter of these modules cannot be made a model; None when it can."""
        return self._probe.reason_against(paths)

    def layers_for_context(self) -> MergedLayers | None:
        return None if self.current is None else self._resident[self.current].layers

    def switch(self, content_hash: str | None, weights: Mapping[str, ModuleWeights] | None = None) -> None:
        """Let the passes from here on see a model; ``weights`` make it when it runs for the first time."""
        if content_hash is not None:
            if content_hash not in self._resident:
                self._bring(content_hash, weights or {})
            self._resident.move_to_end(content_hash)
        self.current = content_hash

    def _bring(self, content_hash: str, weights: Mapping[str, ModuleWeights]) -> None:
        self.current = None
        if len(self._resident) < self._num_resident:
            merger = ShadowMerger(self._model, self._paths)
        else:
            merger = self._resident.popitem(last=False)[1]
        if content_hash in self._host:
            merger.copy_in(self._host[content_hash])
            self.num_swaps += 1
        else:
            merger.merge({path: (w.A, w.B, w.scaling) for path, w in weights.items()})
            self._host[content_hash] = merger.copy_out()
        self._resident[content_hash] = merger
