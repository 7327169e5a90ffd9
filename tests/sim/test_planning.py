"""Plans of the simulator: as good as greedy ones at least, bounded by work, and the same every time."""

from __future__ import annotations

import pytest

from peft_dist.placement.types import ClusterView, MigrationPlan, PlanError
from peft_dist.sim.planning import MAX_PROGRAMS, SteadyPlanner
from tests.placement.cases import random_view

VIEWS = [random_view(seed, replicas=4, classes=16, count=6, adapters=6) for seed in range(12)]


def test_the_solver_improves_on_greedy_somewhere_and_is_worse_nowhere() -> None:
    greedy, solver = SteadyPlanner("greedy"), SteadyPlanner("solver")
    plans: list[tuple[MigrationPlan, MigrationPlan]] = [(greedy(view), solver(view)) for view in VIEWS]
    assert all(solved.objective <= alone.objective for alone, solved in plans)
    assert any(solved.origin == "solver" and solved.objective < alone.objective for alone, solved in plans)
    assert greedy.num_programs == 0 and 0 < solver.num_programs <= MAX_PROGRAMS * len(VIEWS)
    assert solver.wall_seconds > 0


def test_plans_are_the_same_every_time() -> None:
    first, second = (list(map(SteadyPlanner("solver"), VIEWS)) for _ in range(2))
    assert first == second


def test_a_view_that_contradicts_itself_is_no_plan() -> None:
    broken = ClusterView(VIEWS[0].replicas[:1] * 2, VIEWS[0].adapters, VIEWS[0].classes)
    for method in ("greedy", "solver"):
        with pytest.raises(PlanError, match="twice"):
            SteadyPlanner(method)(broken)  # type: ignore[arg-type]
