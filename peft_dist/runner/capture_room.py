"""Whether a device has memory for one more captured step, and what is done where it has not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from peft_dist.runner.rank_group import RankGroup
from peft_dist.runner.step_buffer import StepShape

logger = logging.getLogger(__name__)

# Of a device that is one of several ranks', for a step to be captured: what the largest captured step of a 70B model on
# four ranks takes while it runs, and what the driver and NCCL keep of it, with some to spare.
_FREE_BYTES = 512 << 20

_T = TypeVar("_T")


class CaptureRoom:
    """Sizes of steps that found no memory: nothing is lost but speed, as their batches run operator by operator."""

    def __init__(self) -> None:
        self._full: set[StepShape] = set()

    def lacks(self, shape: StepShape) -> bool:
        """Whether a step of this size found no memory since the last ``forget``."""
        return shape in self._full

    def attempt(self, shape: StepShape, capture: Callable[[], _T]) -> _T | None:
        """Capture a step of this size; None where there is no memory, or was none before."""
        if shape in self._full:
            return None
        try:
            return capture()
        except torch.OutOfMemoryError as error:
            self._note(shape, str(error))
            return None

    def forget(self) -> None:
        """There may be memory now: steps were dropped, or what is captured has changed."""
        self._full.clear()

    def _note(self, shape: StepShape, reason: str) -> None:
        # Once: the other sizes follow, for the same reason.
        level = logging.DEBUG if self._full else logging.WARNING
        self._full.add(shape)
        logger.log(
            level,
            "no memory to capture a step of %d tokens (%s): batches of that size, and of others that find none, run "
            "operator by operator, which is slower. Remedy: lower --gpu-memory-utilization, --max-num-seqs or "
            "--num-blocks",
            shape.tokens,
            reason,
        )


class SplitCaptureRoom(CaptureRoom):
    """Of one of several ranks, all of which capture the same steps or none.

    A rank that fails in the midst of one leaves the others waiting for it on their devices, where nobody can call them
    back. So they ask each other before; an error that comes all the same ends the rank, and the others with it.
    """

    def __init__(self, ranks: RankGroup, free_bytes: Callable[[], int]) -> None:
        """``free_bytes``: What this rank's device could still give."""
        super().__init__()
        self._ranks, self._free_bytes = ranks, free_bytes

    def attempt(self, shape: StepShape, capture: Callable[[], _T]) -> _T | None:
        """All ranks have to come by, with the same size."""
        if self.lacks(shape):
            return None
        least = self._ranks.smallest(self._free_bytes())
        if least >= _FREE_BYTES:
            return capture()
        self._note(
            shape, f"{max(least, 0) >> 20} MiB are free on the fullest rank's device, {_FREE_BYTES >> 20} asked for"
        )
        return None


def make_room(ranks: RankGroup, device: torch.device) -> CaptureRoom:
    """For captures on one rank's device."""
    return SplitCaptureRoom(ranks, lambda: _free_bytes(device)) if ranks.is_split else CaptureRoom()


def _free_bytes(device: torch.device) -> int:
    # What torch keeps for later is given back by a capture too, before it begins.
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)
