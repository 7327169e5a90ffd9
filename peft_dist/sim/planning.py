"""Plans of moves whose answer does not depend on this machine's speed."""

from __future__ import annotations

import time
from collections.abc import Callable

from peft_dist.placement.planning import greedy_plan, plans
from peft_dist.placement.program import Program
from peft_dist.placement.types import ClusterView, MigrationPlan
from peft_dist.sim.options import PlanMethod

# The live planner has 0.2 s, of which greedy may take half. Programs with a hundred flows take some 20 to 100 ms, so
# that two are what is left is enough for.
MAX_PROGRAMS = 2
# Of HiGHS's branch and bound in each: its first node alone is as long. The live planner stops it by time.
MAX_NODES = 1
_LIMIT = 1.0


class SteadyPlanner:
    """Plans as the live planner's process makes them, bounded by work where that one is bounded by time.

    ``solver``: the greedy plan, then the same rounds of programs with HiGHS, ``MAX_PROGRAMS`` at most and each of
    ``MAX_NODES`` nodes at most. ``greedy``: the greedy plan alone, which is what the live one falls back to. Both run
    here and now, and take as long as they do: ``wall_seconds``, all together.
    """

    def __init__(self, method: PlanMethod) -> None:
        self.method = method
        self.wall_seconds = 0.0
        self.num_programs = 0

    def __call__(self, view: ClusterView) -> MigrationPlan:
        """Raises PlanError for a view that contradicts itself."""
        return self.timed(self._plan)(view)

    def timed(self, plan: Callable[[ClusterView], MigrationPlan]) -> Callable[[ClusterView], MigrationPlan]:
        """Another way to plan whose seconds count here."""

        def measured(view: ClusterView) -> MigrationPlan:
            began = time.perf_counter()
            try:
                return plan(view)
            finally:
                self.wall_seconds += time.perf_counter() - began

        return measured

    def _plan(self, view: ClusterView) -> MigrationPlan:
        return greedy_plan(view, "virtual time") if self.method == "greedy" else self._solved(view)

    def _solved(self, view: ClusterView) -> MigrationPlan:
        from peft_dist.placement.solving import solve

        left = MAX_PROGRAMS

        def count(program: Program, seconds: float, gap: float) -> tuple[list[float] | None, str]:
            nonlocal left
            left -= 1
            self.num_programs += 1
            return solve(program, None, gap, MAX_NODES)

        # None is worse than the one before it, and the last is the best of all.
        *_, best = plans(view, count, lambda: _LIMIT if left else 0.0)
        return best
