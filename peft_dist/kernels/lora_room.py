"""How much of a device the rank intermediates of any step take: what the LoRA kernels ask of their workspace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from peft_dist.kernels.lora_fused_plans import MOST_ADDED_ROWS
from peft_dist.kernels.lora_plans import RANKS, GroupShape, default_plan, rank_room, tables_of, tile_count
from peft_dist.kernels.lora_tiles import DECODE_TILE_ROWS, TILE_ROWS, max_tiles

_MOST_LAYERS = 3
# Of a linear that is one launch with its adapters: parts of a shrink; outputs times parts of the product, each of which
# has as many numbers as rows; and what is counted.
_FUSED_SPLIT, _FUSED_SUMS, _COUNTERS = 8, 264 * 64, 1 << 14


def most_per_rank(in_features: Iterable[int], rows: int, slots: int, rank: int, device_name: str) -> int:
    """Numbers that one launch leaves at most, for each of ``LoRAWorkspace.max_rank``.

    Args:
        in_features: Of the layers that adapters may target.
        rows: Of the largest step.
        slots: Adapters that are there at once.
        rank: The highest.
        device_name: Whose table of plans is asked (``lora_plans.tables_of``).
    """
    inputs = set(in_features)
    fused = max_tiles(min(rows, MOST_ADDED_ROWS), slots, DECODE_TILE_ROWS, has_base=True) * DECODE_TILE_ROWS
    most = _MOST_LAYERS * (fused * _FUSED_SPLIT + MOST_ADDED_ROWS)
    for tile_rows, tiles, ranks in _launches(rows, slots, rank):
        for layers in range(1, _MOST_LAYERS + 1):
            split = _most_split(tile_rows, tiles, inputs, layers, ranks, device_name)
            most = max(most, tiles * tile_rows * layers * split)
    return most


def fixed_bytes() -> int:
    """What goes by no rank."""
    return 4 * (_FUSED_SUMS * MOST_ADDED_ROWS + _COUNTERS)


def _launches(rows: int, slots: int, rank: int) -> Iterator[tuple[int, int, int]]:
    """(tile rows, tiles, ranks) of the largest launch of each plan."""
    for tile_rows in TILE_ROWS:
        most = max_tiles(rows, slots, tile_rows, has_base=True)
        if tile_rows != DECODE_TILE_ROWS:
            yield tile_rows, most, RANKS
            continue
        counts = {tile_count(tiles, tile_rows) for tiles in range(1, most + 1)}
        for count in counts:
            ranks = RANKS
            while ranks <= rank_room(rank):
                # More tiles than are told apart have the plan of the most that are.
                yield tile_rows, most if count == max(counts) else count, ranks
                ranks *= 2


def _most_split(tile_rows: int, tiles: int, inputs: set[int], layers: int, ranks: int, device_name: str) -> int:
    """Of any plan for so many layers: which measured one is the nearest goes by their outputs too."""
    shape = GroupShape(tile_rows, tile_count(tiles, tile_rows), 1, (1,) * layers, ranks)
    usual = (default_plan(shape._replace(in_features=width)).split for width in inputs)
    measured = (
        plan.split
        for known, plan in tables_of(device_name)
        if (known.tile_rows, len(known.out_features), known.ranks) == (tile_rows, layers, ranks)
    )
    return max((*usual, *measured), default=1)
