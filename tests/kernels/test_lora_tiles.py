"""Tiles of rows: every row with an adapter is in exactly one, with its own adapter, and the capacity suffices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.kernels.lora_group import make_tiles
from peft_dist.kernels.lora_tiles import choose_tile_rows, max_tiles, write_tiles


def arrays(room: int, tile_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.full(room * tile_rows, -7, np.int32), np.full(room, -7, np.int32), np.full(room, 99, np.int32)


@settings(deadline=None, max_examples=200)
@given(
    slots=st.lists(st.integers(-1, 6), max_size=90),
    tile_rows=st.sampled_from([16, 32, 64]),
    has_base=st.booleans(),
)
def test_every_row_is_in_one_tile_of_its_adapter(slots: list[int], tile_rows: int, has_base: bool) -> None:
    row_slots = np.array(slots, np.int32)
    room = max_tiles(len(slots), 7, tile_rows, has_base=has_base)
    rows, tile_slots, lens = arrays(room, tile_rows)
    used = write_tiles(row_slots, rows, tile_slots, lens, tile_rows=tile_rows, has_base=has_base)
    assert (lens[:used] > 0).all() and (lens[:used] <= tile_rows).all() and not lens[used:].any()
    placed = []
    for tile in range(used):
        members = rows[tile * tile_rows :][: lens[tile]]
        assert (row_slots[members] == tile_slots[tile]).all()
        assert (rows[tile * tile_rows :][lens[tile] : tile_rows] == -7).all(), "wrote behind a tile's rows"
        placed += members.tolist()
    wanted = range(len(slots)) if has_base else np.flatnonzero(row_slots >= 0).tolist()
    assert sorted(placed) == list(wanted)
    owners, counts = np.unique(row_slots[placed], return_counts=True)
    assert used == sum(-(-counts // tile_rows)), "an adapter has more tiles than it needs"
    if has_base and (owners >= 0).any():
        assert tile_slots[0] >= 0, "the base's tiles come last"


def test_the_capacity_is_reached() -> None:
    for num_rows, num_slots, tile_rows in ((1, 32, 16), (32, 32, 16), (256, 32, 16), (255, 3, 16), (70, 2, 64)):
        room = max_tiles(num_rows, num_slots, tile_rows)
        owners = min(num_rows, num_slots)
        # One row each, and all others of one adapter.
        slots = np.array([*range(owners), *[0] * (num_rows - owners)], np.int32)
        worst = [write_tiles(slots, *arrays(room, tile_rows), tile_rows=tile_rows)]
        # Every adapter one row over a whole tile, as far as the rows go.
        slots = np.array([slot for slot in range(owners) for _ in range(tile_rows + 1)][:num_rows], np.int32)
        worst.append(write_tiles(slots, *arrays(room, tile_rows), tile_rows=tile_rows))
        assert room - 1 <= max(worst) <= room <= min(num_rows, num_slots + -(-num_rows // tile_rows))


def test_too_little_room_is_refused() -> None:
    with pytest.raises(ValueError, match="3 rows of 3 adapters need 3 tiles, not 2"):
        write_tiles(np.array([4, 2, -1, 0], np.int32), *arrays(2, 16), tile_rows=16)


def test_the_longest_share_of_rows_decides_the_tile() -> None:
    assert choose_tile_rows(np.array([-1, -1])) == 16
    assert choose_tile_rows(np.arange(40)) == 16
    assert choose_tile_rows(np.repeat(np.arange(4), 40)) == 32
    assert choose_tile_rows(np.array([*range(30), *[31] * 500])) == 128


@pytest.mark.parametrize("count", range(1, 10))
def test_every_part_of_made_tiles_begins_where_kernels_are_compiled_for(count: int) -> None:
    """At multiples of 16 bytes of one copy; Triton compiles a kernel once more for any other place."""
    tiles = make_tiles(np.arange(count, dtype=np.int32), torch.device("cpu"))
    for part in (tiles.rows, tiles.slots, tiles.lens):
        assert part.storage_offset() * part.element_size() % 16 == 0
    assert tiles.slots.tolist() == list(range(count)) and tiles.lens.tolist() == [1] * count
    assert tiles.rows.view(count, 16)[:, 0].tolist() == list(range(count))


@pytest.mark.parametrize(("slots", "added"), [([-1] * 40, 1), ([-1] * 40 + [2], 1), ([3] * 17 + [-1] * 40 + [2], 3)])
def test_launches_that_only_add_leave_out_the_bases_tiles(slots: list[int], added: int) -> None:
    row_slots = np.array(slots, np.int32)
    tiles = make_tiles(row_slots, torch.device("cpu"), 16, has_base=True)
    assert tiles.added == added < tiles.max_tiles
    assert (tiles.slots[: tiles.added] >= 0).all() or (row_slots < 0).all()
    assert (tiles.slots[tiles.added :] < 0).all()
    # What a captured step's tiles will hold nobody knows.
    assert tiles._replace(with_adapter=None).added == tiles.max_tiles
