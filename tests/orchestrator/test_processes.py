"""How the end of a replica's processes is told."""

from __future__ import annotations

import asyncio
import signal

import pytest

from peft_dist.orchestrator.processes import Processes


class _Ended:
    def __init__(self, code: int | None) -> None:
        self._code = code

    async def wait(self) -> int | None:
        return self._code

    async def stop(self, grace: float) -> None:
        """It has."""

    def kill(self) -> None:
        """It has."""


class _Nobody:
    async def start(self, endpoint: str, replica_id: int, epoch: int) -> _Ended:
        raise AssertionError


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, "exited with status 3"),
        (-signal.SIGKILL, "was killed by SIGKILL"),
        (None, "has ended"),
        (1, "exited with status 1 (if it logged nothing, it was killed, perhaps for want of memory: see dmesg)"),
    ],
)
def test_how_a_replica_ended(code: int | None, words: str) -> None:
    """accelerate's status is 1 for a worker that was killed, and for all else."""
    assert asyncio.run(Processes(_Nobody(), "", {0: _Ended(code)}).end(0)) == words
