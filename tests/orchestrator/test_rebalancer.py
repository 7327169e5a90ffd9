"""What the asyncio part does with plans that come, fail, or come too late."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

import pytest

from peft_dist.core.messages import AddRequest
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.events import PlacementDue, PlanDue
from peft_dist.orchestrator.rebalancer import MOVES_AT_ONCE, Rebalancer
from peft_dist.orchestrator.records import Outgoing
from peft_dist.placement.planner import Planner
from peft_dist.placement.planning import greedy_plan
from peft_dist.placement.types import ClusterView, MigrationPlan, PlanError
from tests.orchestrator.test_migration import skewed


class FakePlanner(Planner):
    def __init__(self, answer: Callable[[ClusterView], Awaitable[MigrationPlan]]) -> None:
        super().__init__()
        self._answer = answer
        self.closed = False

    async def plan(self, view: ClusterView) -> MigrationPlan:
        return await self._answer(view)

    async def close(self) -> None:
        self.closed = True


class Driver:
    """A core, and what was sent for it."""

    def __init__(self, core: Orchestrator, answer: Callable[[ClusterView], Awaitable[MigrationPlan]]) -> None:
        self.core = core
        self.sent: list[list[Outgoing]] = []
        self.planner = FakePlanner(answer)
        self.rebalancer = Rebalancer(core.migration, self.act, lambda: 1.0, self.planner)

    def act(self, commands: Iterable[Outgoing]) -> None:
        self.sent.append(list(commands))
        for event in self.core.drain_events():
            if isinstance(event, PlanDue | PlacementDue):
                self.rebalancer.begin(event)

    async def settled(self) -> None:
        view = self.core.migration.view()
        while view is None or not view.plans:
            await asyncio.sleep(0)
            view = self.core.migration.view()

    def plans(self) -> dict[tuple[str, str], int]:
        view = self.core.migration.view()
        return view.plans if view is not None else {}


async def greedy(view: ClusterView) -> MigrationPlan:
    return greedy_plan(view)


def test_moves_are_carried_out_a_few_at_a_time() -> None:
    async def work() -> None:
        driver = Driver(skewed(60, seats=30), greedy)
        driver.act(driver.core.tick(1.0))
        await driver.settled()
        moves = [sum(isinstance(out.command, AddRequest) for out in commands) for commands in driver.sent]
        assert sum(moves) > 2 * MOVES_AT_ONCE == 2 * max(moves)
        await driver.rebalancer.stop()
        assert driver.planner.closed

    asyncio.run(work())


def test_a_view_that_contradicts_itself_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def refuse(view: ClusterView) -> MigrationPlan:
        raise PlanError("replica 7 is in the view twice")

    async def work() -> None:
        driver = Driver(skewed(8), refuse)
        driver.act(driver.core.tick(1.0))
        await driver.settled()
        assert driver.plans() == {("failed", "period"): 1}

    asyncio.run(work())
    assert "no plan was made: replica 7 is in the view twice" in caplog.text


def test_a_bug_in_planning_ends_no_request(caplog: pytest.LogCaptureFixture) -> None:
    async def crash(view: ClusterView) -> MigrationPlan:
        raise ZeroDivisionError

    async def work() -> None:
        driver = Driver(skewed(8), crash)
        driver.act(driver.core.tick(1.0))
        await driver.settled()
        await asyncio.sleep(0)
        assert driver.plans() == {("failed", "period"): 1} and driver.core.num_unfinished == 8

    asyncio.run(work())
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == ["rebalancing failed"]


def test_stopping_drops_the_plan_that_is_being_made() -> None:
    async def never(view: ClusterView) -> MigrationPlan:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def work() -> None:
        driver = Driver(skewed(8), never)
        driver.act(driver.core.tick(1.0))
        await asyncio.sleep(0)
        await driver.rebalancer.stop()
        assert driver.planner.closed and not any(
            isinstance(out.command, AddRequest) for commands in driver.sent for out in commands
        )
        driver.rebalancer.begin(PlanDue("period"))
        assert driver.plans() == {("failed", "period"): 1}, "nothing begins any more"

    asyncio.run(work())
