"""What a captured step reads is what the step that is run operator by operator gets, and padding that hurts nobody."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.core.batch import NO_ADAPTER, PLACEHOLDER, Batch, ScheduledSequence
from peft_dist.runner.block_tables import BlockTables
from peft_dist.runner.inputs import pack
from peft_dist.runner.merge_state import split_slots
from peft_dist.runner.step_buffer import TILE_ROWS, PlanBuffers, StepBuffer, StepShape, TileBuffers
from peft_dist.runner.step_inputs import StepInputs

BLOCK, MAX_BLOCKS, SLOTS, DUMP = 4, 8, 5, 999
CPU = torch.device("cpu")


@st.composite
def sequences(draw, decodes: bool) -> list[ScheduledSequence]:
    found = []
    for index in range(draw(st.integers(1, 7))):
        start = draw(st.integers(0, BLOCK * MAX_BLOCKS - 4))
        length = 1 if decodes else draw(st.integers(1, 4))
        samples = decodes or draw(st.booleans())
        blocks = -(-(start + length) // BLOCK)
        token = PLACEHOLDER if samples and length == 1 and draw(st.booleans()) else 50 + index
        found.append(
            ScheduledSequence(
                f"s{index}",
                [*range(100, 99 + length), token],
                start,
                draw(st.lists(st.integers(0, 99), min_size=blocks, max_size=blocks)),
                draw(st.sampled_from([NO_ADAPTER, 0, 3, 4])),
                samples=samples,
            )
        )
    return found


def send(batch: list[ScheduledSequence], shape: StepShape, merged_slot: int, inputs: StepInputs) -> StepBuffer:
    target = StepBuffer.over(torch.full((StepBuffer.num_bytes(shape),), 77, dtype=torch.uint8), shape)
    inputs.send(target, shape, batch, merged_slot, lambda name: (int(name[1:]) + 10, 3), (200, DUMP))
    return target


def rows_of(tiles: TileBuffers) -> dict[int, list[int]]:
    """Rows by slot, from tiles on the host."""
    found: dict[int, list[int]] = {}
    for index, (slot, count) in enumerate(zip(tiles.slots.tolist(), tiles.lens.tolist(), strict=True)):
        if count:
            found.setdefault(slot, []).extend(tiles.rows[index * TILE_ROWS :][:count].tolist())
    return found


def check_plan(plan: PlanBuffers, row_slots: np.ndarray, merged_slot: int) -> None:
    for tiles, slots in zip((plan.added, plan.taken), split_slots(row_slots, merged_slot), strict=True):
        wanted = {slot: np.flatnonzero(slots == slot).tolist() for slot in set(slots.tolist())}
        assert {slot: sorted(rows) for slot, rows in rows_of(tiles).items()} == wanted


@settings(max_examples=150, deadline=None)
@given(st.data(), st.booleans(), st.sampled_from([NO_ADAPTER, 3]))
def test_a_step_gets_what_pack_gives(data: st.DataObject, decodes: bool, merged_slot: int) -> None:
    batch = data.draw(sequences(decodes))
    count, total = len(batch), sum(len(sequence.token_ids) for sequence in batch)
    shape = StepShape(9, 9, MAX_BLOCKS, SLOTS) if decodes else StepShape(30, 8, MAX_BLOCKS, SLOTS)
    buffer = send(batch, shape, merged_slot, StepInputs(StepBuffer.num_bytes(shape), MAX_BLOCKS, BLOCK, CPU))
    packed = pack(Batch(0, batch, merged_slot=merged_slot), {}, BLOCK, CPU, "torch", "torch")
    meta = packed.attention

    pending = dict(packed.pending)
    for row, token in enumerate(packed.input_ids[0].tolist()):
        if row in pending:
            assert buffer.sources[row] == int(pending[row][1:]) + 10 and buffer.input_ids[row] == 3
        else:
            assert buffer.sources[row] == -1 and buffer.input_ids[row] == token
    assert buffer.positions[:total].tolist() == packed.position_ids[0].tolist()
    assert buffer.slot_mapping[:total].tolist() == meta.slot_mapping.tolist()
    assert buffer.context_lens[:count].tolist() == meta.context_lens.tolist()
    assert buffer.query_start_loc[: count + 1].tolist() == meta.query_start_loc.tolist()
    for row, sequence in enumerate(batch):
        assert buffer.block_tables[row, : len(sequence.block_table)].tolist() == sequence.block_table
    draws = len(packed.sampled)
    if draws:
        assert buffer.logits_rows[:draws].tolist() == packed.logits_rows.tolist()
    assert buffer.destinations.tolist() == [*range(200, 200 + draws)] + [DUMP] * (shape.rows - draws)

    slots = np.array([sequence.adapter_slot for sequence in batch], np.int32)
    check_plan(buffer.lora, np.repeat(slots, [len(sequence.token_ids) for sequence in batch]), merged_slot)
    sampling = np.array([sequence.samples for sequence in batch])
    check_plan(buffer.lora_logits, slots[sampling], merged_slot)

    assert (buffer.slot_mapping[total:] == -1).all() and (buffer.sources[total:] == -1).all()
    assert not buffer.context_lens[count:].any() and not buffer.block_tables[count:].any()
    lengths = buffer.query_start_loc.diff()
    assert (lengths[count:] == int(decodes)).all() and buffer.query_start_loc[-1] == (shape.rows if decodes else total)


def test_steps_on_their_way_do_not_disturb_one_another() -> None:
    shape = StepShape(2, 2, MAX_BLOCKS, SLOTS)
    inputs = StepInputs(StepBuffer.num_bytes(shape), MAX_BLOCKS, BLOCK, CPU, num_pieces=2)
    first = send([ScheduledSequence("s0", [7], 3, [5], samples=True)], shape, NO_ADAPTER, inputs)
    second = send([ScheduledSequence("s0", [8], 4, [5, 6], samples=True)], shape, NO_ADAPTER, inputs)
    assert first.input_ids[0] == 7 and second.input_ids[0] == 8
    assert first.slot_mapping[0] == 5 * BLOCK + 3 and second.slot_mapping[0] == 6 * BLOCK


class TestBlockTables:
    def test_a_row_follows_its_table(self) -> None:
        tables, out = BlockTables(4), np.full((1, 4), 9, np.int32)
        for table in ([1], [1, 2], [3, 2], [5, 6, 7], [8]):
            tables.gather([ScheduledSequence("s0", [1], 0, table)], out)
            assert out[0].tolist() == table + [0] * (4 - len(table))

    def test_rows_are_reused_and_more_are_made(self) -> None:
        tables = BlockTables(2)
        batch = [ScheduledSequence(f"s{i}", [1], 0, [i, i + 1]) for i in range(40)]
        out = np.zeros((40, 2), np.int32)
        tables.gather(batch, out)
        assert out.tolist() == [sequence.block_table for sequence in batch]
        for sequence in batch[:39]:
            tables.forget(sequence.request_id)
        assert len(set(tables._free)) == len(tables._free) == len(tables._rows) - 1
        tables.forget("never seen")
