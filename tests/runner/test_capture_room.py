"""Ranks capture the same steps or none: one that fails in the midst of a step would leave the others waiting in it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from peft_dist.runner.capture_room import CaptureRoom, SplitCaptureRoom, make_room
from peft_dist.runner.rank_group import RankGroup
from peft_dist.runner.step_buffer import StepShape

SHAPE, OTHER = StepShape(8, 8, 4, 4), StepShape(4, 4, 4, 4)
PLENTY = 1 << 34


class Meeting(RankGroup):
    """One of two ranks, the other of which says what the test wants."""

    def __init__(self) -> None:
        super().__init__(0, 2)
        self.other = PLENTY
        self.meetings = 0

    def agree(self, value: Any) -> list[Any]:
        self.meetings += 1
        return [value, self.other]


def full() -> int:
    raise torch.OutOfMemoryError("no memory")


def test_what_found_no_memory_is_not_tried_until_it_is_forgotten() -> None:
    room = CaptureRoom()
    assert room.attempt(SHAPE, full) is None and room.lacks(SHAPE) and not room.lacks(OTHER)
    assert room.attempt(SHAPE, lambda: 3) is None and room.attempt(OTHER, lambda: 4) == 4
    room.forget()
    assert not room.lacks(SHAPE) and room.attempt(SHAPE, lambda: 3) == 3


@pytest.mark.parametrize(("own", "other"), [(PLENTY, 0), (0, PLENTY)])
def test_ranks_capture_nothing_that_one_has_no_memory_for(
    own: int, other: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever it is: both come to the same."""
    ranks = Meeting()
    room = SplitCaptureRoom(ranks, lambda: own)
    assert room.attempt(SHAPE, lambda: 3) == (3 if own else None)
    room.forget()
    caplog.clear()
    ranks.other, captured = other, list[int]()
    with caplog.at_level(logging.WARNING):
        for shape in (SHAPE, SHAPE, OTHER):
            assert room.attempt(shape, lambda: captured.append(1)) is None and room.lacks(shape)
    assert not captured and ranks.meetings == 3, "a size that found no memory is no reason to meet again"
    assert len(caplog.messages) == 1 and "fullest rank" in caplog.messages[0]


def test_a_rank_that_fails_in_a_capture_ends() -> None:
    room = SplitCaptureRoom(Meeting(), lambda: PLENTY)
    with pytest.raises(torch.OutOfMemoryError):
        room.attempt(SHAPE, full)


def test_one_rank_asks_nobody() -> None:
    assert type(make_room(RankGroup(), torch.device("cpu"))) is CaptureRoom
    assert type(make_room(Meeting(), torch.device("cpu"))) is SplitCaptureRoom
