"""Which adapter the model's weights hold, and the plans of the rows that want another."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
from torch import nn

from peft_dist.kernels.types import LoRAPlan
from peft_dist.patches.host_merger import HostMerger
from peft_dist.patches.merged_layers import MergedLayers
from peft_dist.patches.merging import Merger
from peft_dist.patches.shadow_merger import ShadowMerger
from peft_dist.runner.adapter_tensors import ModuleWeights

logger = logging.getLogger(__name__)

MergeWay = Literal["auto", "shadow", "host"]


class MergeState:
    """The adapter that is merged into a model, changed between two forward passes.

    Attributes:
        current: Content hash of the merged adapter; None: the base.
    """

    def __init__(
        self, model: nn.Module, way: MergeWay = "auto", budget_bytes: int | None = None, paths: Collection[str] = ()
    ) -> None:
        """Choose the way; nothing is copied yet (``allocate``).

        Args:
            way: "auto" takes "shadow" where its bytes for ``paths`` fit the budget, else "host".
            budget_bytes: What "auto" may give to the shadow; None: whatever it needs. An adapter that brings further
                layers is not mergeable when their copies would exceed it.
            paths: Layers that adapters are expected to target. Those that cannot be merged into are passed over.
        """
        self.current: str | None = None
        self._held: str | None = None
        self._budget = budget_bytes if way == "auto" else None
        self._merger: Merger = ShadowMerger(model, paths)
        if way == "host" or (self._budget is not None and self._merger.num_bytes > self._budget):
            self._merger, self._budget = HostMerger(model, paths), None
        logger.info(
            "adapters are merged by way of %s: %.0f MiB of second copies, %.0f MiB of them on the device",
            self.way,
            self.num_bytes / 2**20,
            self.device_bytes / 2**20,
        )

    @property
    def way(self) -> str:
        """ "shadow" or "host"."""
        return self._merger.way

    @property
    def num_bytes(self) -> int:
        """Bytes of the second copies, made or yet to be made."""
        return self._merger.num_bytes

    @property
    def device_bytes(self) -> int:
        """Those of them that the model's device holds: to be counted when KV is sized."""
        return self._merger.num_bytes if self._merger.on_device else 0

    @property
    def held(self) -> str | None:
        """The adapter that comes back at no cost after the base: what the shadow holds. None in place."""
        return self._held if self.way == "shadow" else None

    @property
    def cannot(self) -> Mapping[str, str]:
        """Why not, by the path of each layer that no adapter can be merged into."""
        return self._merger.cannot

    def allocate(self) -> None:
        """Make the second copies now. Those of layers packed by oneDNN are made by the merge itself."""
        self._merger.allocate()

    def mergeable(self, paths: Collection[str]) -> str | None:
        """Why an adapter of these layers has to run unmerged; None when it can be merged."""
        if reason := self._merger.reason_against(paths):
            return reason
        needed = self._merger.bytes_with(paths)
        if self._budget is not None and needed > self._budget:
            return f"its merged weights would need {needed} bytes in all, and {self._budget} are given to them"
        return None

    def layers_for_context(self) -> MergedLayers | None:
        """For ``ForwardContext.merged`` of every pass."""
        return self._merger.layers

    def switch(self, content_hash: str | None, weights: Mapping[str, ModuleWeights] | None = None) -> None:
        """Let the passes from here on see the base (None) or an adapter merged into it.

        Those that were started before see what they saw. An adapter that was merged last before the base comes back at
        no cost where the shadow still holds it.

        Args:
            weights: The adapter's, by path; not needed for the base.

        Raises:
            ValueError: the adapter is not ``mergeable``, or does not fit the model; nothing has changed.
            Exception: whatever else failed; ``current`` is None then, and the model the base's.
        """
        if content_hash == self.current:
            return
        if content_hash is None:
            self._merger.unmerge()
            self.current = None
        elif content_hash == self._held and self._merger.resume():
            self.current = content_hash
        else:
            self._merge(content_hash, weights or {})

    def _merge(self, content_hash: str, weights: Mapping[str, ModuleWeights]) -> None:
        reason = self.mergeable(weights) if weights else "its weights were not given"
        if reason:
            raise ValueError(f"adapter {content_hash}: {reason}")
        try:
            self._merger.merge({path: (w.A, w.B, w.scaling) for path, w in weights.items()})
        except BaseException:
            if not self._merger.is_merged:
                self.current = self._held = None
            raise
        self.current = self._held = content_hash


def plans_for(
    row_slots: np.ndarray, merged_slot: int | None, backend: str | None = None
) -> tuple[LoRAPlan | None, LoRAPlan | None]:
    """What is added to the rows of a pass, and what is added beside it to take the merged adapter away.

    Args:
        row_slots: int ``[rows]``, the adapter slot that each row wants; -1 for the base.
        merged_slot: Where the merged adapter lies in the ``LoRAPool``; None where nothing is merged. Rows that want
            it get nothing added. It must be resident unless all rows want it.
        backend: As in ``LoRAPlan``.

    Returns:
        For ``ForwardContext.lora`` and ``lora_correction`` (or ``lora_logits`` and ``lora_logits_correction``).
    """
    row_slots = np.asarray(row_slots, dtype=np.int32)
    if merged_slot is None or merged_slot < 0:
        return LoRAPlan.from_rows(row_slots, backend), None
    is_merged = row_slots == merged_slot
    correction = LoRAPlan.from_rows(np.where(is_merged, -1, merged_slot), backend)
    if correction is not None:
        correction.factor = -1.0
    return LoRAPlan.from_rows(np.where(is_merged, -1, row_slots), backend), correction
