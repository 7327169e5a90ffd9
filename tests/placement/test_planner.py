"""The planner and its process: the limit, the kill, and what is answered when the solver is of no help."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest

from peft_dist.core.errors import ConfigError
from peft_dist.placement.planner import Planner, SolverError
from peft_dist.placement.planning import greedy_plan
from peft_dist.placement.types import ClusterView, MigrationPlan, PlanError
from tests.placement.cases import random_view
from tests.placement.test_plans import keeps_its_promises, last_plan

FAKE = str(Path(__file__).with_name("fake_solver.py"))
ROOT = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]))


def views(origin: str, number: int) -> list[ClusterView]:
    found = []
    for view in map(random_view, range(240)):
        if last_plan(view).origin == origin:
            found.append(view)
        if len(found) == number:
            break
    return found


def pid_of(planner: Planner) -> int:
    assert planner.pid is not None
    return planner.pid


def fake(kind: str, limit: float = 0.2) -> Planner:
    return Planner(limit, command=(sys.executable, FAKE, kind))


def same_moves(a: MigrationPlan, b: MigrationPlan) -> bool:
    return (a.moves, a.steps, a.objective) == (b.moves, b.steps, b.objective)


def test_a_warm_process_makes_one_plan_after_another() -> None:
    async def scenario() -> None:
        async with Planner(limit=20.0) as planner:
            await planner.warm()
            for view in views("solver", 5):
                plan = await planner.plan(view)
                keeps_its_promises(view, plan)
                assert plan.origin == "solver"
                assert plan.objective == pytest.approx(last_plan(view).objective, abs=1e-3 * plan.objective)
            # Several at once wait for one another.
            together = await asyncio.gather(*map(planner.plan, views("greedy", 3)))
            assert [plan.origin for plan in together] == ["greedy"] * 3
            assert planner.num_restarts == 0

    asyncio.run(scenario())


def test_before_the_process_is_warm_plans_are_greedy() -> None:
    async def scenario() -> None:
        (view,) = views("solver", 1)
        async with fake("never warm", limit=60.0) as planner:
            plan = await planner.plan(view)
            assert same_moves(plan, greedy_plan(view)) and plan.status == "the solver is starting"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("hangs", "killed at its limit"),
        ("mute", "killed at its limit"),
        ("dies", "has ended"),
        ("babbles", "no answer"),
        ("late", "instead of"),
    ],
)
def test_a_solver_that_fails_is_replaced_and_the_plan_is_greedy(kind: str, status: str) -> None:
    async def scenario() -> None:
        (view,) = views("solver", 1)
        # The greedy plan has to be whole within the limit, also on a busy machine.
        async with fake(kind, limit=2.0 if kind in ("hangs", "mute") else 60.0) as planner:
            for attempt in (1, 2):
                await planner.warm()
                plan = await planner.plan(view)
                assert same_moves(plan, greedy_plan(view)) and plan.origin == "greedy"
                assert status in plan.status and planner.num_restarts == attempt

    asyncio.run(scenario())


def test_a_process_killed_between_plans_is_replaced() -> None:
    async def scenario() -> None:
        (view,) = views("solver", 1)
        async with Planner(limit=20.0) as planner:
            await planner.warm()
            os.kill(pid_of(planner), signal.SIGKILL)
            assert (await planner.plan(view)).origin == "greedy"
            await planner.warm()
            assert (await planner.plan(view)).origin == "solver"

    asyncio.run(scenario())


def test_the_loop_runs_on_while_the_solver_does_not() -> None:
    async def scenario() -> None:
        async with fake("mute", limit=1.0) as planner:
            await planner.warm()
            planning = asyncio.ensure_future(planner.plan(random_view(0)))
            turns = 0
            while not planning.done():
                turns += 1
                await asyncio.sleep(0)
            assert turns > 100

    asyncio.run(scenario())


@pytest.mark.parametrize(("kind", "reason"), [("cold", "no solver in this house"), ("dies", None)])
def test_warmth_says_why_there_is_none(kind: str, reason: str | None) -> None:
    async def scenario() -> None:
        async with fake(kind) as planner:
            if reason is None:
                await planner.warm()
                return
            with pytest.raises(SolverError, match=reason):
                await planner.warm()
            assert (await planner.plan(random_view(0))).status == reason
        async with Planner(command=("/nowhere/solver",)) as planner:
            with pytest.raises(SolverError, match="cannot be started"):
                await planner.warm()

    asyncio.run(scenario())


def test_the_process_ends_with_the_planner() -> None:
    async def scenario() -> int:
        async with Planner() as planner:
            await planner.warm()
            return pid_of(planner)

    pid = asyncio.run(scenario())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_caller_that_gives_up_leaves_a_planner_that_works() -> None:
    async def scenario() -> None:
        (view,) = views("solver", 1)
        async with fake("mute", limit=60.0) as planner:
            await planner.warm()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(planner.plan(view), 0.05)
            assert planner.num_restarts == 1
            await planner.warm()

    asyncio.run(scenario())


def test_bad_views_and_limits_are_named() -> None:
    view = random_view(0)
    lost = msgspec.structs.replace(view, replicas=view.replicas[1:])
    half = msgspec.structs.replace(view.classes[0], count=1.5)
    first = next(i for i, one in enumerate(view.classes) if one.source == 10)

    async def scenario() -> None:
        async with Planner(limit=20.0) as planner:
            await planner.warm()
            with pytest.raises(PlanError, match=f"request class {first} is on replica 10, which is not in the view"):
                await planner.plan(lost)
            with pytest.raises(PlanError, match=r"Expected `int`, got `float` - at `\$.classes\[0\].count`"):
                await planner.plan(msgspec.structs.replace(view, classes=[half]))
            assert planner.num_restarts == 0

    asyncio.run(scenario())
    with pytest.raises(ConfigError, match="limit=0 of the planner must be above 0 seconds"):
        Planner(0)
