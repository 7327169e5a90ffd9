"""A batch is written into pinned memory, and brought to the device by one copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from peft_dist.core.batch import PLACEHOLDER, ScheduledSequence
from peft_dist.kernels.lora_tiles import write_tiles
from peft_dist.runner.block_tables import BlockTables
from peft_dist.runner.merge_state import split_slots
from peft_dist.runner.step_buffer import TILE_ROWS, PlanBuffers, StepBuffer, StepShape, TileBuffers

FindDraw = Callable[[str], tuple[int, int]]
"""The latest draw of a sequence: where it is in ``DrawnTokens`` (negative: nowhere), and the token if it is known."""

_Tiles = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(slots=True)
class _Arrays:
    """``StepBuffer``'s views as numpy arrays, under the same names."""

    input_ids: np.ndarray
    positions: np.ndarray
    sources: np.ndarray
    slot_mapping: np.ndarray
    logits_rows: np.ndarray
    destinations: np.ndarray
    query_start_loc: np.ndarray
    context_lens: np.ndarray
    block_tables: np.ndarray
    lora: tuple[_Tiles, _Tiles]
    lora_logits: tuple[_Tiles, _Tiles]

    @classmethod
    def of(cls, buffer: StepBuffer) -> _Arrays:
        return cls(
            input_ids=buffer.input_ids.numpy(),
            positions=buffer.positions.numpy(),
            sources=buffer.sources.numpy(),
            slot_mapping=buffer.slot_mapping.numpy(),
            logits_rows=buffer.logits_rows.numpy(),
            destinations=buffer.destinations.numpy(),
            query_start_loc=buffer.query_start_loc.numpy(),
            context_lens=buffer.context_lens.numpy(),
            block_tables=buffer.block_tables.numpy(),
            lora=_plan_arrays(buffer.lora),
            lora_logits=_plan_arrays(buffer.lora_logits),
        )


def _plan_arrays(plan: PlanBuffers) -> tuple[_Tiles, _Tiles]:
    return _tile_arrays(plan.added), _tile_arrays(plan.taken)


def _tile_arrays(tiles: TileBuffers) -> _Tiles:
    return tiles.rows.numpy(), tiles.slots.numpy(), tiles.lens.numpy()


class _Piece:
    """Pinned memory for one step, its views for each shape, and when the device has read it."""

    def __init__(self, num_bytes: int, pinned: bool) -> None:
        self.memory = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.read = torch.cuda.Event() if pinned else None
        self._views: dict[StepShape, tuple[StepBuffer, _Arrays]] = {}

    def views(self, shape: StepShape) -> tuple[StepBuffer, _Arrays]:
        if shape not in self._views:
            buffer = StepBuffer.over(self.memory, shape)
            self._views[shape] = (buffer, _Arrays.of(buffer))
        return self._views[shape]


class StepInputs:
    """Writes the inputs of batches for the device; several steps may be on their way there.

    Args:
        num_bytes: Of the largest shape.
        max_blocks: Blocks of the longest sequence.
        block_size: Tokens in a KV block.
        num_pieces: Steps that may be on their way; one more waits for the first to have been read.
    """

    def __init__(
        self, num_bytes: int, max_blocks: int, block_size: int, device: torch.device, num_pieces: int = 3
    ) -> None:
        self._block_size = block_size
        self._tables = BlockTables(max_blocks)
        pinned = device.type == "cuda"
        self._pieces = [_Piece(num_bytes, pinned) for _ in range(num_pieces)]
        self._next = 0

    def forget(self, request_id: str) -> None:
        """A sequence has ended."""
        self._tables.forget(request_id)

    def send(
        self,
        target: StepBuffer,
        shape: StepShape,
        sequences: Sequence[ScheduledSequence],
        merged_slot: int,
        find_draw: FindDraw,
        destinations: tuple[int, int],
    ) -> None:
        """Queue the copy of a batch's inputs to ``target``, which has this shape.

        Args:
            sequences: No more, and no more tokens, than the shape has. Those that draw keep their order.
            merged_slot: As in ``Batch``.
            find_draw: Asked for sequences whose token is a placeholder.
            destinations: Where the first draw goes, and where those of padded rows do.
        """
        piece = self._pieces[self._next]
        self._next = (self._next + 1) % len(self._pieces)
        if piece.read is not None:
            piece.read.synchronize()
        buffer, arrays = piece.views(shape)
        self._write(arrays, shape, sequences, merged_slot, find_draw, destinations)
        target.memory.copy_(buffer.memory, non_blocking=True)
        if piece.read is not None:
            piece.read.record()

    def _write(
        self,
        to: _Arrays,
        shape: StepShape,
        sequences: Sequence[ScheduledSequence],
        merged_slot: int,
        find_draw: FindDraw,
        destinations: tuple[int, int],
    ) -> None:
        count, size = len(sequences), self._block_size
        lengths = np.fromiter((len(sequence.token_ids) for sequence in sequences), np.int64, count)
        firsts = np.fromiter((sequence.start for sequence in sequences), np.int64, count)
        ends = np.cumsum(lengths)
        total = int(ends[-1])
        owners = np.repeat(np.arange(count), lengths)
        positions = np.arange(total) + np.repeat(firsts - ends + lengths, lengths)
        to.positions[:total] = positions
        to.input_ids[:total] = np.fromiter((t for s in sequences for t in s.token_ids), np.int64, total)
        self._tables.gather(sequences, to.block_tables[:count])
        blocks = to.block_tables[owners, positions // size].astype(np.int64)
        to.slot_mapping[:total] = blocks * size + positions % size
        to.context_lens[:count] = firsts + lengths
        to.query_start_loc[0] = 0
        to.query_start_loc[1 : count + 1] = ends
        self._write_draws(to, total, sequences, owners, find_draw)
        slots = np.fromiter((sequence.adapter_slot for sequence in sequences), np.int32, count)
        draws = np.flatnonzero(np.fromiter((sequence.samples for sequence in sequences), bool, count))
        to.logits_rows[: len(draws)] = ends[draws] - 1
        to.destinations[: len(draws)] = np.arange(destinations[0], destinations[0] + len(draws))
        _write_plan(to.lora, slots[owners], merged_slot)
        if not shape.decodes:
            _write_plan(to.lora_logits, slots[draws], merged_slot)
        # Padding: inputs that are kept nowhere and belong to no sequence, sequences of no length.
        to.input_ids[total:] = to.positions[total:] = to.context_lens[count:] = to.logits_rows[len(draws) :] = 0
        to.slot_mapping[total:] = -1
        to.block_tables[count:] = 0
        to.query_start_loc[count + 1 :] = total
        if shape.decodes:
            to.query_start_loc[count + 1 :] += np.arange(1, shape.rows - count + 1, dtype=np.int32)
        to.destinations[len(draws) :] = destinations[1]

    def _write_draws(
        self,
        to: _Arrays,
        total: int,
        sequences: Sequence[ScheduledSequence],
        owners: np.ndarray,
        find_draw: FindDraw,
    ) -> None:
        to.sources[:] = -1
        for row in np.flatnonzero(to.input_ids[:total] == PLACEHOLDER).tolist():
            to.sources[row], to.input_ids[row] = find_draw(sequences[owners[row]].request_id)


def _write_plan(plan: tuple[_Tiles, _Tiles], row_slots: np.ndarray, merged_slot: int) -> None:
    for tiles, slots in zip(plan, split_slots(row_slots, merged_slot), strict=True):
        write_tiles(slots, *tiles, tile_rows=TILE_ROWS, has_base=True)
