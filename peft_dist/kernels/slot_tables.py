"""The tables of many LoRA layers on a device, where a slot changes in all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from peft_dist.kernels.lora_tables import TABLE_HEAD
from peft_dist.kernels.transfer import to_device

# Layers in one allocation. A model's layers come one by one, and those that have come must stay where they are.
BLOCK_LAYERS = 128


class SlotTables:
    """Twins of the host tables of a sized pool's layers, at fixed addresses.

    Layer by layer a load would be hundreds of small copies, on the thread that launches the steps: here it is two a
    block of layers, whatever their number.

    Args:
        num_pages: Of each layer.
    """

    def __init__(self, num_slots: int, num_pages: int, device: torch.device) -> None:
        self._size = num_slots, TABLE_HEAD + num_pages
        self._device = device
        self._blocks: list[torch.Tensor] = []
        self._num_layers = 0

    def add_layer(self) -> torch.Tensor:
        """The next layer's table: int32 ``[slots, TABLE_HEAD + pages]``, all zero, as ``LayerTables`` describes it."""
        block, row = divmod(self._num_layers, BLOCK_LAYERS)
        if block == len(self._blocks):
            self._blocks.append(torch.zeros(BLOCK_LAYERS, *self._size, dtype=torch.int32, device=self._device))
        self._num_layers += 1
        return self._blocks[block][row]

    def show(self, slot: int, entries: Mapping[int, tuple[float, int, Sequence[int]]]) -> None:
        """Enter a slot into the tables of these layers (scaling, rank, pages), and into no other.

        A GPU copies behind what is queued on its current stream.
        """
        width = TABLE_HEAD + max((len(pages) for _, _, pages in entries.values()), default=0)
        rows = np.zeros((self._num_layers, width), np.int32)
        for layer, (scaling, rank, pages) in entries.items():
            row = rows[layer]
            row[0] = rank
            row[1] = np.float32(scaling).view(np.int32)
            row[TABLE_HEAD : TABLE_HEAD + len(pages)] = pages
        there = to_device(torch.from_numpy(rows), self._device)
        for block, part in zip(self._blocks, there.split(BLOCK_LAYERS), strict=True):
            block[: len(part), slot, :width].copy_(part)

    def hide(self, slot: int) -> None:
        """Have no layer adapted by a slot."""
        for block in self._blocks:
            block[:, slot, :TABLE_HEAD].zero_()
