"""One deadline on either event loop, and pauses of it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from peft_dist.orchestrator.timer import Pulse, Timer

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    found: Run = pytest.importorskip(request.param).run
    return found


def test_the_earliest_time_counts_also_one_that_is_due(run: Run) -> None:
    """uvloop hands out another kind of handle for what is due within half a millisecond."""

    async def work() -> None:
        loop, fired = asyncio.get_running_loop(), asyncio.Event()
        times: list[float] = []
        timer = Timer(lambda: (times.append(loop.time()), fired.set()))  # type: ignore[func-returns-value]
        timer.arm(math.inf)
        assert not timer.is_armed
        now = loop.time()
        for when in (now + 60, now - 1, now + 30, now - 0.5):
            timer.arm(when)
        await asyncio.wait_for(fired.wait(), 60)
        assert len(times) == 1 and times[0] < now + 30 and not timer.is_armed
        timer.arm(loop.time() - 1)
        timer.cancel()
        await asyncio.sleep(0)
        assert len(times) == 1

    run(work())


def test_a_pause_is_told_before_a_deadline_that_passed_in_it(run: Run) -> None:
    async def work() -> None:
        loop, told, fired = asyncio.get_running_loop(), [], asyncio.Event()
        pulse = Pulse(lambda: told.append("pause"))
        timer = Timer(lambda: (told.append("deadline"), fired.set()))  # type: ignore[func-returns-value]
        await asyncio.sleep(2.5 * Pulse.SECONDS)
        # On a busy machine the first beats may have been late as well.
        told.clear()
        # Its time comes a moment before this process goes on.
        timer.arm(loop.time() + Pulse.PAUSE + 2 * Pulse.SECONDS - 0.01)
        time.sleep(Pulse.PAUSE + 2 * Pulse.SECONDS)
        await asyncio.wait_for(fired.wait(), 60)
        assert told == ["pause", "deadline"]
        pulse.stop()
        time.sleep(Pulse.PAUSE + 2 * Pulse.SECONDS)
        await asyncio.sleep(0)
        assert len(told) == 2

    run(work())


def test_a_pause_is_told_before_a_deadline_that_was_due_before_the_next_beat(run: Run) -> None:
    """A timer that was armed for an earlier reason found that all replicas had been silent: their streams were lost."""

    async def work() -> None:
        loop, told, fired = asyncio.get_running_loop(), [], asyncio.Event()
        pulse = Pulse(lambda: told.append("pause"))
        timer = Timer(lambda: (told.append("deadline"), fired.set()), pulse)  # type: ignore[func-returns-value]
        told.clear()
        timer.arm(loop.time())
        time.sleep(Pulse.PAUSE + 2 * Pulse.SECONDS)
        await asyncio.wait_for(fired.wait(), 60)
        pulse.look()
        assert told == ["pause", "deadline"]
        pulse.stop()

    run(work())
