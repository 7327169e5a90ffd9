"""The tables of many LoRA layers, on the host and on a device, where a slot changes in all of them at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from peft_dist.kernels.lora_tables import TABLE_HEAD, use_table
from peft_dist.kernels.page_allocator import page_table
from peft_dist.kernels.transfer import to_device
from peft_dist.kernels.types import LoRALayerWeights

# Layers in one allocation. A model's layers come one by one, and those that have come must stay where they are.
BLOCK_LAYERS = 128


class _Block(NamedTuple):
    """Tables of some layers: int32 ``[layers, slots, TABLE_HEAD + pages]`` twice, and bool ``[layers, slots]``."""

    host: np.ndarray
    device: torch.Tensor
    finite: np.ndarray


class SlotTables:
    """The tables of a sized pool's layers, at fixed addresses.

    Layer by layer a load would be hundreds of small copies, on the thread that launches the steps: here it is two a
    block of layers, whatever their number.

    Args:
        num_pages: Of each layer.
    """

    def __init__(self, num_slots: int, num_pages: int, device: torch.device) -> None:
        self._size = num_slots, TABLE_HEAD + num_pages
        self._device = device
        self._blocks: list[_Block] = []
        self._num_layers = 0

    def add_layer(self, weights: LoRALayerWeights) -> None:
        """Have the next layer's weights read these tables, in which no slot adapts it yet."""
        block, row = divmod(self._num_layers, BLOCK_LAYERS)
        if block == len(self._blocks):
            size = BLOCK_LAYERS, *self._size
            device = torch.zeros(size, dtype=torch.int32, device=self._device)
            self._blocks.append(_Block(np.zeros(size, np.int32), device, np.zeros(size[:2], bool)))
        self._num_layers += 1
        host, device, finite = (part[row] for part in self._blocks[block])
        weights.rank, weights.pages, weights.finite = host[:, 0], host[:, TABLE_HEAD:], finite
        weights.scaling = host.view(np.float32)[:, 1]
        use_table(weights, device)

    def show(
        self,
        slot: int,
        ranks: Mapping[int, int],
        scaling: Mapping[int, float],
        pages: Mapping[int, Sequence[int]],
        *,
        finite: bool,
    ) -> None:
        """Enter a slot into the tables of the layers that the three have, and into no other.

        A GPU copies behind what is queued on its current stream.
        """
        layers = list(ranks)
        table = page_table([pages[layer] for layer in layers])
        rows = np.zeros((self._num_layers, TABLE_HEAD + table.shape[1]), np.int32)
        rows[layers, 0] = [ranks[layer] for layer in layers]
        rows[layers, 1] = np.array([scaling[layer] for layer in layers], np.float32).view(np.int32)
        rows[layers, TABLE_HEAD:] = table
        there = to_device(torch.from_numpy(rows), self._device)
        for number, block in enumerate(self._blocks):
            part = slice(number * BLOCK_LAYERS, (number + 1) * BLOCK_LAYERS)
            count = len(rows[part])
            block.host[:count, slot, : rows.shape[1]] = rows[part]
            block.finite[:count, slot] = finite & (rows[part, 0] > 0)
            block.device[:count, slot, : rows.shape[1]].copy_(there[part])

    def hide(self, slot: int) -> None:
        """Have no layer adapted by a slot."""
        for block in self._blocks:
            block.host[:, slot] = 0
            block.finite[:, slot] = False
            block.device[:, slot, :TABLE_HEAD].zero_()

    def unadapted(self, layers: Iterable[int]) -> list[int]:
        """Of these layers those that no slot adapts."""
        adapted = [adapted for block in self._blocks for adapted in block.host[:, :, 0].any(axis=1)]
        return [layer for layer in layers if not adapted[layer]]
