"""What a captured decode pass reads and what changes from step to step, at addresses that stay."""

from __future__ import annotations

import numpy as np
import torch

from peft_dist.kernels.lora_tiles import LoRATiles, choose_tile_rows, max_tiles, write_tiles
from peft_dist.kernels.types import AttentionMetadata, LoRAPlan
from peft_dist.patches.kv_memory import BLOCK_SIZE
from peft_dist.patches.paged_cache import PassLayout

_FEWEST_BLOCKS = 16


def table_width(blocks: int) -> int:
    """Columns of the block tables for rows of so many blocks: a power of two, so that captures serve many lengths."""
    return max(_FEWEST_BLOCKS, _power_of_two(blocks))


def tile_shape(row_slots: np.ndarray) -> tuple[int, int]:
    """(tile_rows, tiles) that take these slots (int32 ``[rows]``), and those of most batches that are like them."""
    tile_rows = choose_tile_rows(row_slots)
    adapters = len(np.unique(row_slots[row_slots >= 0]))
    return tile_rows, max_tiles(len(row_slots), _power_of_two(adapters), tile_rows)


def _power_of_two(count: int) -> int:
    """The least that is not below ``count``."""
    return 1 << max(count - 1, 0).bit_length()


class _Staging:
    """The step's numbers in host memory (pinned for a GPU), and when the device has read them."""

    def __init__(self, rows: int, width: int, pinned: bool) -> None:
        self.memory = torch.zeros(num_words(rows, width), dtype=torch.int64, pin_memory=pinned)
        self.slots, self.lens, self.tables = (view.numpy() for view in step_views(self.memory, rows, width))
        self.read = torch.cuda.Event() if pinned else None

    def send(self, target: torch.Tensor) -> None:
        target.copy_(self.memory, non_blocking=True)
        if self.read is not None:
            self.read.record(torch.cuda.current_stream(target.device))

    def wait(self) -> None:
        if self.read is not None:
            self.read.synchronize()


def num_words(rows: int, width: int) -> int:
    """int64 words of ``step_views``."""
    return rows + 2 * _lens_words(rows) + -(-rows * width // 2)


def step_views(memory: torch.Tensor, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of int64 ``[num_words]``: slot mapping int64 ``[rows]``, context lens int32 ``[rows]``, and block tables
    int32 ``[rows, width]``, which begin at a multiple of 16 bytes."""
    start = -(-rows // 2) * 2
    narrow = memory[start:].view(torch.int32)
    offset = 2 * _lens_words(rows)
    return memory[:rows], narrow[:rows], narrow[offset : offset + rows * width].view(rows, width)


def _lens_words(rows: int) -> int:
    return -(-rows // 4) * 2


class DecodeInputs:
    """Buffers of a decode pass over one new token in each of ``rows`` rows.

    Args:
        positions: Like the position ids that the model gets.
        width: Columns of the block tables.
        tiles: (tile_rows, tiles) of the adapters; None where no row has one.

    Attributes:
        ids, positions: int64, what the model gets.
    """

    def __init__(self, ids: torch.Tensor, positions: torch.Tensor, width: int, tiles: tuple[int, int] | None) -> None:
        rows, device = len(ids), ids.device
        self.rows, self.width, self._device = rows, width, device
        # Not those of inference mode, which would be closed to calls outside of it.
        with torch.inference_mode(False):
            self.ids = torch.zeros(ids.shape, dtype=ids.dtype, device=device)
            self.positions = torch.zeros(positions.shape, dtype=positions.dtype, device=device)
            self._memory = torch.zeros(num_words(rows, width), dtype=torch.int64, device=device)
            self._starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
            self._tiles = _make_tiles(tiles, device) if tiles else None
            self._staging = [_Staging(rows, width, device.type == "cuda") for _ in range(2)]
        self._slots, self._lens, self._tables = step_views(self._memory, rows, width)
        self._row_slots = np.full(rows, -1, np.int32)

    def fill(self, ids: torch.Tensor, positions: torch.Tensor, layout: PassLayout, row_slots: np.ndarray) -> None:
        """Queue the copies of a step's inputs; nothing waits for the device.

        Args:
            layout: One token in every row, in no more than ``width`` blocks.
            row_slots: int32 ``[rows]``, adapter slots.
        """
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        self._staging.append(self._staging.pop(0))
        staging = self._staging[0]
        staging.wait()
        staging.slots[:], staging.lens[:] = layout.slots, layout.lens
        used = layout.tables.shape[1]
        staging.tables[:, :used], staging.tables[:, used:] = layout.tables, 0
        staging.send(self._memory)
        if self._tiles is not None and not np.array_equal(row_slots, self._row_slots):
            self._send_tiles(row_slots, self._tiles)

    def _send_tiles(self, row_slots: np.ndarray, tiles: LoRATiles) -> None:
        self._row_slots = row_slots.copy()
        size, count = tiles.tile_rows, tiles.max_tiles
        packed = np.zeros(count * (size + 2), np.int32)
        rows, slots, lens = np.split(packed, [count * size, count * (size + 1)])
        write_tiles(row_slots, rows, slots, lens, tile_rows=size)
        # Once a call, so that waiting for it is no matter.
        for target, source in zip(tiles[:3], (rows, slots, lens), strict=True):
            target.copy_(torch.from_numpy(source))

    def metadata(self) -> AttentionMetadata:
        """Fresh for each pass: what back ends derive from it is part of the pass.

        On a GPU the host arrays say what is true of no batch: kernels that can be captured read the device's alone.
        """
        longest = self.width * BLOCK_SIZE
        on_host = self._device.type == "cpu"
        return AttentionMetadata(
            query_start_loc=np.arange(self.rows + 1, dtype=np.int32),
            context_lens=self._lens.numpy() if on_host else np.full(self.rows, longest, np.int32),
            block_tables=self._tables.numpy() if on_host else np.zeros((self.rows, self.width), np.int32),
            slot_mapping=self._slots.numpy() if on_host else np.full(self.rows, -1, np.int64),
            query_start_loc_t=self._starts,
            context_lens_t=self._lens,
            block_tables_t=self._tables,
            slot_mapping_t=self._slots,
            max_query_len=1,
            max_context_len=longest,
        )

    def plan(self) -> LoRAPlan | None:
        """Likewise. Its runs are those of the rows at the time of the call, its tiles those of any time."""
        plan = LoRAPlan.from_rows(self._row_slots) if self._tiles is not None else None
        if plan is not None:
            plan.tiles = self._tiles
        return plan


def _make_tiles(shape: tuple[int, int], device: torch.device) -> LoRATiles:
    size, count = shape
    packed = torch.zeros(count * (size + 2), dtype=torch.int32, device=device)
    return LoRATiles(*packed.split([count * size, count, count]), tile_rows=size)
