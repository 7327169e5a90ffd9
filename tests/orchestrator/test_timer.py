"""One deadline on either event loop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from peft_dist.orchestrator.timer import Timer

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    found: Run = pytest.importorskip(request.param).run
    return found


def test_the_earliest_time_counts_also_one_that_is_due(run: Run) -> None:
    """uvloop hands out another kind of handle for what is due within half a millisecond."""

    async def work() -> None:
        loop, fired = asyncio.get_running_loop(), asyncio.Event()
        lateness: list[float] = []
        timer = Timer(lambda late: (lateness.append(late), fired.set()))  # type: ignore[func-returns-value]
        timer.arm(math.inf)
        assert not timer.is_armed
        now = loop.time()
        for when in (now + 60, now - 1, now + 30, now - 0.5):
            timer.arm(when)
        await asyncio.wait_for(fired.wait(), 10)
        assert len(lateness) == 1 and lateness[0] >= 1 and not timer.is_armed
        timer.arm(loop.time() - 1)
        timer.cancel()
        await asyncio.sleep(0)
        assert len(lateness) == 1

    run(work())
