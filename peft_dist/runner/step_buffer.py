"""Everything that a captured step reads and that changes from step to step, in one piece of memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from peft_dist.kernels.lora_tiles import max_tiles

_ALIGNMENT = 16
TILE_ROWS = 16


class StepShape(NamedTuple):
    """Sizes that a captured step fixes; a batch of less is padded.

    Attributes:
        tokens: Inputs of all sequences together.
        rows: Sequences. As many as ``tokens``: each has one token, and draws.
        max_blocks: Columns of the block tables.
        slots: Adapters that can be on the device at once.
    """

    tokens: int
    rows: int
    max_blocks: int
    slots: int

    @property
    def decodes(self) -> bool:
        """Every sequence has one token."""
        return self.tokens == self.rows


@dataclass(slots=True)
class TileBuffers:
    """``LoRATiles`` of one plan, the base's rows included: int32 ``[tiles * TILE_ROWS]``, ``[tiles]``, ``[tiles]``."""

    rows: torch.Tensor
    slots: torch.Tensor
    lens: torch.Tensor


@dataclass(slots=True)
class PlanBuffers:
    """Tiles of the two plans of ``merge_state.split_slots``: what rows get added, and what is taken from them."""

    added: TileBuffers
    taken: TileBuffers


@dataclass(slots=True)
class StepBuffer:
    """Views of one piece of memory, device or pinned host, which one copy brings from there to here.

    Attributes:
        memory: uint8, the bytes that all views cover.
        input_ids, positions: int64 ``[tokens]``.
        sources: int64 ``[tokens]``, where in ``DrawnTokens`` the input id is; negative: in ``input_ids``.
        slot_mapping: int64 ``[tokens]``; -1 where there is padding.
        logits_rows: int64 ``[rows]``, inputs whose logits draw a token.
        destinations: int64 ``[rows]``, where in ``DrawnTokens`` these draws go.
        query_start_loc: int32 ``[rows + 1]``.
        context_lens: int32 ``[rows]``; 0 in padded rows.
        lora: Of the inputs; ``lora_logits``: of ``logits_rows``.
        block_tables: int32 ``[rows, max_blocks]``.
    """

    memory: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    sources: torch.Tensor
    slot_mapping: torch.Tensor
    logits_rows: torch.Tensor
    destinations: torch.Tensor
    query_start_loc: torch.Tensor
    context_lens: torch.Tensor
    lora: PlanBuffers
    lora_logits: PlanBuffers
    block_tables: torch.Tensor

    @classmethod
    def over(cls, memory: torch.Tensor, shape: StepShape) -> StepBuffer:
        """Views of the first bytes of ``memory`` (uint8, at least ``num_bytes(shape)``)."""
        taker = _Taker(memory)
        wide = [taker.take(torch.int64, size) for size in (shape.tokens,) * 4 + (shape.rows,) * 2]
        narrow = [taker.take(torch.int32, shape.rows + 1), taker.take(torch.int32, shape.rows)]
        lora = taker.plan(shape.tokens, shape.slots)
        # In a step of decodes the rows are the inputs.
        lora_logits = lora if shape.decodes else taker.plan(shape.rows, shape.slots)
        tables = taker.take(torch.int32, shape.rows, shape.max_blocks)
        return cls(memory[: taker.offset], *wide, *narrow, lora, lora_logits, tables)

    @staticmethod
    def num_bytes(shape: StepShape) -> int:
        """What ``over`` needs."""
        words = 8 * shape.tokens + (shape.max_blocks + 8) * shape.rows + 64
        tiles = 2 * (_num_tiles(shape.tokens, shape.slots) + _num_tiles(shape.rows, shape.slots))
        return 4 * (words + tiles * (TILE_ROWS + 2)) + 64 * _ALIGNMENT


def _num_tiles(rows: int, slots: int) -> int:
    return max_tiles(rows, slots, TILE_ROWS, has_base=True)


class _Taker:
    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.offset = 0

    def take(self, dtype: torch.dtype, *size: int) -> torch.Tensor:
        end = self.offset + math.prod(size) * dtype.itemsize
        view = self.memory[self.offset : end].view(dtype).view(size)
        self.offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        return view

    def plan(self, rows: int, slots: int) -> PlanBuffers:
        return PlanBuffers(self._tiles(rows, slots), self._tiles(rows, slots))

    def _tiles(self, rows: int, slots: int) -> TileBuffers:
        count = _num_tiles(rows, slots)
        sizes = (count * TILE_ROWS, count, count)
        return TileBuffers(*(self.take(torch.int32, size) for size in sizes))
