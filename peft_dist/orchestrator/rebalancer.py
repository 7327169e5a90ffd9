"""Plans and placements on the event loop: made in processes of their own, carried out a little at a time."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from peft_dist.orchestrator.events import PlacementDue, PlanDue
from peft_dist.orchestrator.migration import FAILED, Migration
from peft_dist.orchestrator.records import Outgoing
from peft_dist.placement.placer import Search
from peft_dist.placement.placing_process import SearchError, run_search
from peft_dist.placement.planner import Planner
from peft_dist.placement.types import PlanError

logger = logging.getLogger(__name__)
# Requests that are moved in one go: each is sent with all its tokens.
MOVES_AT_ONCE = 8


class Rebalancer:
    """Does what ``PlanDue`` and ``PlacementDue`` ask for. Lives on the loop of the service that it acts for."""

    def __init__(
        self,
        migration: Migration,
        act: Callable[[Iterable[Outgoing]], None],
        clock: Callable[[], float],
        planner: Planner,
    ) -> None:
        """``act`` sends commands; ``planner`` starts with the first plan, and is closed by ``stop``."""
        self._migration = migration
        self._act = act
        self._clock = clock
        self._planner = planner
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    def begin(self, due: PlanDue | PlacementDue) -> None:
        """Start on it and return."""
        if self._stopped:
            return
        work: Coroutine[Any, Any, None] = self._plan() if isinstance(due, PlanDue) else self._place(due.search)
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def stop(self) -> None:
        """Drop what is being planned, and end the solver."""
        self._stopped = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._planner.close()

    async def _plan(self) -> None:
        start, origin = self._clock(), FAILED
        try:
            origin = await self._carry_out()
        except PlanError as error:
            logger.warning("no plan was made: %s", error)
        finally:
            now = self._clock()
            self._migration.planned(origin, now - start, now)

    async def _carry_out(self) -> str:
        survey = self._migration.survey()
        while survey.step():
            await asyncio.sleep(0)
        surveyed = survey.result(self._clock())
        await asyncio.sleep(0)
        plan = await self._planner.plan(surveyed.view)
        logger.debug("plan of %s (%s): %.3f s instead of %.3f s", plan.origin, plan.status, plan.after, plan.before)
        self._act(self._migration.prepare(plan))
        moves = iter(self._migration.chosen(plan, surveyed))
        while some := list(itertools.islice(moves, MOVES_AT_ONCE)):
            self._act(self._migration.move(some, surveyed, self._clock()))
            await asyncio.sleep(0)
        return plan.origin

    async def _place(self, search: Search) -> None:
        found = None
        try:
            found = await run_search(search)
        except SearchError as error:
            logger.warning("adapters stay where they are placed: %s", error)
        finally:
            self._act(self._migration.placed(search, found, self._clock()))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Requests are served without plans too.
            logger.error("rebalancing failed", exc_info=error)
