"""Which adapter the model's weights hold, and the plans of the rows that want another."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import nn

from peft_dist.kernels.types import LoRAPlan
from peft_dist.patches.host_merger import HostMerger
from peft_dist.patches.merged_layers import MergedLayers
from peft_dist.patches.merging import Merger
from peft_dist.patches.shadow_merger import ShadowMerger
from peft_dist.runner.adapter_tensors import ModuleWeights
from peft_dist.runner.memory import Room, no_limit, reason_against
from peft_dist.runner.pooled_weights import PooledWeights

MergeWay = Literal["auto", "shadow", "host"]


class MergeState:
    """The adapter that is merged into a model, changed between two forward passes.

    Attributes:
        current: Content hash of the merged adapter; None: the base.
    """

    def __init__(
        self, model: nn.Module, way: MergeWay = "auto", room: Room = no_limit, paths: Collection[str] = ()
    ) -> None:
        """Choose the way; nothing is copied yet (``allocate``).

        Args:
            way: "auto" takes "shadow" where its bytes for ``paths`` are no more than half of the room on the device
                (KV blocks need the rest), else "host".
            room: What second copies may still take where they lie, asked when layers join later (``reserve``) too.
            paths: Layers that adapters are expected to target. Those that cannot be merged into are passed over.
        """
        self.current: str | None = None
        self._held: str | None = None
        self._room = room
        self._merger: Merger = ShadowMerger(model, paths)
        left = room(True) if way == "auto" else None
        if way == "host" or (left is not None and 2 * self._merger.num_bytes > left):
            self._merger = HostMerger(model, paths)

    @property
    def way(self) -> str:
        """ "shadow" or "host"."""
        return self._merger.way

    @property
    def num_bytes(self) -> int:
        """Bytes of the second copies, made or yet to be made."""
        return self._merger.num_bytes

    @property
    def on_device(self) -> bool:
        """Whether the second copies lie on the model's device, not on the host."""
        return self._merger.on_device

    @property
    def remedy(self) -> str:
        """What would take less memory of where they lie."""
        return "merge in place (--merge host)" if self.way == "shadow" else "merge nothing (--merge off)"

    @property
    def cannot(self) -> Mapping[str, str]:
        """Why not, by the path of each layer that no adapter can be merged into."""
        return self._merger.cannot

    def more_bytes(self, paths: Iterable[str]) -> int:
        """By how much ``num_bytes`` grows with adapters of these layers too, of those that can be merged into."""
        return self._merger.bytes_with(path for path in paths if self._merger.can_merge([path])) - self.num_bytes

    def allocate(self) -> None:
        """Make the second copies now. Those of layers packed by oneDNN are made by the merge itself."""
        self._merger.allocate()

    def reserve(self, paths: Collection[str]) -> str | None:
        """Make the second copies of these layers that are not there yet, if there is room.

        Returns:
            Why an adapter of these layers has to run unmerged; None when it can be merged, now and later.
        """
        if reason := self.reason_against(paths):
            return reason
        if self._merger.knows(paths) or not self.more_bytes(paths):
            return None
        try:
            self._merger.expect(paths)
        except (torch.OutOfMemoryError, MemoryError) as error:
            return f"there is no memory for second copies of its layers ({error}): {self.remedy}"
        return None

    def reason_against(self, paths: Collection[str]) -> str | None:
        """What ``reserve`` would say, as far as that is known before any memory is taken."""
        if self._merger.knows(paths):
            return None
        if reason := self._merger.reason_against(paths):
            return reason
        needed, what = self.more_bytes(paths), "second copies of its layers"
        return reason_against(needed, self._room, what, self.remedy, on_device=self.on_device)

    def base_weight(self, path: str) -> torch.Tensor:
        """The weight of a layer that can be merged into, as it is without adapters. For any thread."""
        return self._merger.base_weight(path)

    def holds(self, content_hash: str | None) -> bool:
        """Whether ``switch`` brings this at no cost: the shadow holds the base, and what was merged last. Never in
        place."""
        return self.way == "shadow" and (content_hash is None or content_hash == self._held)

    def discard(self, content_hash: str) -> None:
        """An adapter is gone. The second copies stay for the others."""
        if content_hash == self._held != self.current:
            self._held = None

    def layers_for_context(self) -> MergedLayers | None:
        """For ``ForwardContext.merged`` of every pass."""
        return self._merger.layers

    def layers_for_capture(self) -> MergedLayers | None:
        """What ``layers_for_context`` will be when an adapter is merged; None in place."""
        return self._merger.ready_layers() if isinstance(self._merger, ShadowMerger) else None

    def switch(self, content_hash: str | None, weights: Mapping[str, ModuleWeights] | None = None) -> None:
        """Let the passes from here on see the base (None) or an adapter merged into it.

        Those that were started before see what they saw. An adapter that was merged last before the base comes back at
        no cost where the shadow still holds it.

        Args:
            weights: The adapter's, by path; not needed for the base. ``PooledWeights`` are merged where they lie,
                without a copy, where a kernel can.

        Raises:
            ValueError: the adapter cannot be merged (``reserve``), or does not fit the model; nothing has changed.
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
        reason = self.reserve(weights) if weights else "its weights were not given"
        if reason:
            raise ValueError(f"adapter {content_hash}: {reason}")
        try:
            if not isinstance(weights, PooledWeights) or not self._merger.merge_pooled(weights.adapter):
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
    wanted, correction = split_slots(np.asarray(row_slots, dtype=np.int32), merged_slot)
    plan = LoRAPlan.from_rows(correction, backend)
    if plan is not None:
        plan.factor = -1.0
    return LoRAPlan.from_rows(wanted, backend), plan


def split_slots(row_slots: np.ndarray, merged_slot: int | None) -> tuple[np.ndarray, np.ndarray]:
    """What each row of a pass gets added, and what it gets taken away: int32 ``[rows]`` each, -1 for nothing."""
    if merged_slot is None or merged_slot < 0:
        return row_slots, np.full_like(row_slots, -1)
    is_merged = row_slots == merged_slot
    return np.where(is_merged, -1, row_slots), np.where(is_merged, -1, merged_slot).astype(np.int32)
