"""Every layer's ranks, scalings and pages looked up for all tiles at once, once a pass.

In each of a layer's launches the tables are otherwise a link in the chain of loads that wait for each other: the tile's
slot, then the slot's entry, which is in no cache, then the weights. With a copy of the entries by tile, where a program
finds its own by its number, that link is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from peft_dist.kernels.lora_plans import RANKS
from peft_dist.kernels.lora_tables import TABLE_HEAD, LayerTables, layer_tables
from peft_dist.kernels.lora_tiles import LoRATiles
from peft_dist.kernels.lora_workspace import LoRAWorkspace
from peft_dist.kernels.transfer import to_device
from peft_dist.kernels.triton_device import device_of
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan

_TILES = 32
MOST_ROWS = 128
"""Of steps whose rows' tiles are looked up too."""


class Lookup(NamedTuple):
    """Of all layers and tiles.

    Attributes:
        entries: int32 ``[layers, tiles, columns]``; zeros where a tile has no adapter in a layer, or no rows.
        places: Of each layer by the id of its weights.
        row_tiles: int32 ``[MOST_ROWS]``, the tile that each row is in; -1: none. Empty where there are more rows.
        ready: int32 ``[layers]``, zeros: counters for one launch each (``take_counter``).
    """

    entries: torch.Tensor
    places: dict[int, int]
    row_tiles: torch.Tensor
    ready: torch.Tensor
    taken: set[int]

    def take_counter(self, weights: LoRALayerWeights) -> int | None:
        """Place of a layer's counter; None when the pass has used it, which nobody puts back to 0."""
        place = self.places[id(weights)]
        if place in self.taken:
            return None
        self.taken.add(place)
        return place

    def tables_of(self, weights: LoRALayerWeights) -> LayerTables:
        """A layer's tables with tiles in the place of slots."""
        return LayerTables.of(weights, self.entries[self.places[id(weights)]])


@triton.jit
def _lookup_kernel(
    tables, tile_rows, tile_slots, tile_lens, entries, ready, row_tiles, num_tiles,
    COLUMNS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (layer, some tiles). ROWS: room of ``row_tiles``; 0: it is not wanted."""
    layer = tl.program_id(0)
    if tl.program_id(1) == 0:
        tl.store(ready + layer, 0)
        if (ROWS > 0) & (layer == 0):
            tl.store(row_tiles + tl.arange(0, max(ROWS, 1)), -1)
            tl.debug_barrier()
            for first in range(0, num_tiles, TILES):
                i = first + tl.arange(0, TILES)[:, None]
                m = tl.arange(0, TILE)[None, :]
                is_row = (i < num_tiles) & (m < tl.load(tile_lens + i, mask=i < num_tiles, other=0))
                row = tl.load(tile_rows + i * TILE + m, mask=is_row, other=0)
                tl.store(row_tiles + row, i + 0 * m, mask=is_row)
    t = tl.program_id(1) * TILES + tl.arange(0, TILES)
    c = tl.arange(0, BLOCK)
    length = tl.load(tile_lens + t, mask=t < num_tiles, other=0)
    slot = tl.load(tile_slots + t, mask=t < num_tiles, other=-1)
    table = tl.load(tables + 4 * layer).to(tl.pointer_type(tl.int32))
    stride = tl.load(tables + 4 * layer + 1)
    slots = tl.load(tables + 4 * layer + 2)
    width = tl.load(tables + 4 * layer + 3)
    is_known = (length > 0) & (slot >= 0) & (slot < slots)
    found = tl.load(table + slot[:, None] * stride + c[None, :], mask=is_known[:, None] & (c < width)[None, :], other=0)
    here = entries + (layer * num_tiles + t).to(tl.int64)[:, None] * COLUMNS + c[None, :]
    tl.store(here, found, mask=(t < num_tiles)[:, None] & (c < COLUMNS)[None, :])


def lookup_of(plan: LoRAPlan, tiles: LoRATiles, weights: Sequence[LoRALayerWeights], max_rank: int) -> Lookup | None:
    """The plan's, made when a pass first asks; None where some of these are not among the plan's layers.

    Args:
        max_rank: Room for any adapter's ranks, a power of two.
    """
    found = plan.scratch.get("lookup")
    if found is None and plan.layers:
        found = plan.scratch["lookup"] = _look_up(plan.layers, tiles, max_rank, plan.num_rows)
    if not isinstance(found, Lookup) or any(id(w) not in found.places for w in weights):
        return None
    return found


def ranks_of(workspace: LoRAWorkspace, lookup: Lookup | None) -> int:
    """What a launch is made for (``GroupShape.ranks``): other launches than captured steps', whose tables were looked
    up, keep one plan whatever adapters come, since each plan is a kernel to compile."""
    return RANKS if lookup is None else workspace.ranks


def _look_up(layers: Sequence[LoRALayerWeights], tiles: LoRATiles, max_rank: int, num_rows: int) -> Lookup:
    device = layers[0].A.device
    columns = TABLE_HEAD + -(-max_rank // layers[0].page_rows)
    entries = torch.empty(len(layers), tiles.max_tiles, columns, dtype=torch.int32, device=device)
    # Of one size: each would be a kernel of its own.
    room = MOST_ROWS if num_rows <= MOST_ROWS else 0
    row_tiles, ready = (torch.empty(size, dtype=torch.int32, device=device) for size in (room, len(layers)))
    with device_of(entries):
        _lookup_kernel[(len(layers), triton.cdiv(tiles.max_tiles, _TILES))](
            _addresses(layers), tiles.rows, tiles.slots, tiles.lens, entries, ready, row_tiles, tiles.max_tiles,
            COLUMNS=columns, TILES=_TILES, BLOCK=triton.next_power_of_2(columns), TILE=tiles.tile_rows, ROWS=room,
            num_warps=2,
        )  # fmt: skip
    return Lookup(entries, {id(w): i for i, w in enumerate(layers)}, row_tiles, ready, set())


def _addresses(layers: Sequence[LoRALayerWeights]) -> torch.Tensor:
    """int64 ``[layers, 4]``: address, distance of two slots, slots and columns of each table, kept while they stand.

    A captured pass finds what the run before it made.
    """
    tables = [layer_tables(w) for w in layers]
    wanted = [(t.rank.data_ptr(), t.rank.stride(0), len(t.rank), TABLE_HEAD + t.pages.shape[1]) for t in tables]
    held = layers[0].scratch.get("lookup_addresses")
    if held is None or held[0] != wanted:  # type: ignore[index]
        held = wanted, to_device(torch.tensor(wanted, dtype=torch.int64), layers[0].A.device)
        layers[0].scratch["lookup_addresses"] = held
    found: torch.Tensor = held[1]  # type: ignore[index]
    return found
