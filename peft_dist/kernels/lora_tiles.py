"""Rows grouped by adapter into tiles: what LoRA kernels on a device go by. Built on the host, in numpy alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

DECODE_TILE_ROWS = 16
TILE_ROWS = (16, 32, 64, 128)


class LoRATiles(NamedTuple):
    """Tiles on the device; a tile is up to ``tile_rows`` rows, anywhere in the batch, of one adapter.

    Attributes:
        rows: int32 ``[max_tiles * tile_rows]``; tile t holds the rows ``rows[t * tile_rows :][: lens[t]]``.
        slots: int32 ``[max_tiles]``, the adapter slot of each tile; -1: rows of the base.
        lens: int32 ``[max_tiles]``, 0 in tiles that are not used; what is in their other entries does not matter.
        tile_rows: 16, 32, 64 or 128.
        has_base: The rows of the base are in tiles too, which kernels that compute more than an addition need.
        with_adapter: How many are not the base's, where the host knows: the first ones.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    lens: torch.Tensor
    tile_rows: int
    has_base: bool = False
    with_adapter: int | None = None

    @property
    def max_tiles(self) -> int:
        """Tiles that a launch covers, used or not."""
        return self.lens.shape[0]

    @property
    def added(self) -> int:
        """Tiles that a launch covers which only adds: at least one."""
        return self.max_tiles if self.with_adapter is None else max(self.with_adapter, 1)


def max_tiles(num_rows: int, num_slots: int, tile_rows: int, *, has_base: bool = False) -> int:
    """Most tiles that ``num_rows`` rows of ``num_slots`` adapters need: every adapter has one, and the rest fills."""
    owners = min(num_rows, num_slots + has_base)
    return owners + (num_rows - owners) // tile_rows


def choose_tile_rows(row_slots: np.ndarray) -> int:
    """Tile for a batch with these slots (int ``[rows]``), by the rows that share an adapter as a row sees it.

    Short tiles cost a row more weights read, long ones a product with rows that are not there, which is cheaper: so the
    mean is over rows, and a long chunk decides for the decodes beside it. Rows of the base do not count: whatever its
    size, their tile reads no weights, and no kernel but a gate's has anything to do for it.
    """
    counts = np.unique(row_slots[row_slots >= 0], return_counts=True)[1]
    if not len(counts):
        return DECODE_TILE_ROWS
    mean = int((counts * counts).sum() // counts.sum())
    return next((size for size in reversed(TILE_ROWS) if size <= mean), DECODE_TILE_ROWS)


def write_tiles(
    row_slots: np.ndarray,
    rows: np.ndarray,
    slots: np.ndarray,
    lens: np.ndarray,
    *,
    tile_rows: int,
    has_base: bool = False,
) -> int:
    """Fill ``LoRATiles``' arrays (host memory, pinned for a GPU) for rows with these slots.

    Args:
        row_slots: int ``[num_rows]``, in any order; negative: no adapter.
        rows, slots, lens: int32, written in place; only ``lens`` is written beyond the tiles that are used.
        has_base: Put rows without an adapter into tiles of slot -1, behind the others.

    Returns:
        How many tiles are used.

    Raises:
        ValueError: the arrays hold fewer tiles than these rows need.
    """
    order = np.argsort(row_slots, kind="stable")
    ordered = row_slots[order]
    num_base = int(np.searchsorted(ordered, 0))
    if num_base:
        # The base's rows go to the end, where they are cut off or not.
        order = np.concatenate((order[num_base:], order[:num_base]))
        ordered = np.concatenate((ordered[num_base:], np.full(num_base, -1, ordered.dtype)))
    count = len(order) if has_base else len(order) - num_base
    if not count:
        lens[:] = 0
        return 0
    order, ordered = order[:count], ordered[:count]
    starts = np.concatenate(([0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1))
    counts = np.diff(starts, append=count)
    tiles = -(-counts // tile_rows)
    ends = np.cumsum(tiles)
    first = ends - tiles
    used = int(ends[-1])
    if used > len(lens):
        raise ValueError(f"LoRA tiles: {count} rows of {len(starts)} adapters need {used} tiles, not {len(lens)}")
    # A group's rows follow each other through its tiles, so only its last tile has holes.
    rows[np.arange(count) + np.repeat(first * tile_rows - starts, counts)] = order
    slots[:used] = np.repeat(ordered[starts], tiles)
    lens[:used] = tile_rows
    lens[ends - 1] = counts - (tiles - 1) * tile_rows
    lens[used:] = 0
    return used
