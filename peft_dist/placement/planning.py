"""From a view to a plan: greedy first, then what the solver finds in the time there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from peft_dist.placement.adapter_steps import adapter_steps
from peft_dist.placement.assignment import RESOLUTION
from peft_dist.placement.greedy import greedy
from peft_dist.placement.improvement import MAX_FLOWS, Round, Solve, improve
from peft_dist.placement.problem import Flows, Problem
from peft_dist.placement.types import ClusterView, MigrationPlan, Move, Origin

# Of the time, for greedy: with 32 replicas, half of them empty, it would take more than there is.
GREEDY_SHARE = 0.5


def greedy_plan(
    view: ClusterView, status: str = "not asked", seconds_left: Callable[[], float] = lambda: math.inf
) -> MigrationPlan:
    """The greedy plan alone, as far as it gets in time. Raises PlanError for a view that contradicts itself."""
    return _Plans(Problem(view), seconds_left).plan("greedy", status)


def plans(
    view: ClusterView, solve: Solve, seconds_left: Callable[[], float], max_flows: int = MAX_FLOWS
) -> Iterator[MigrationPlan]:
    """The greedy plan, then better ones by ``solve`` while ``seconds_left()`` is above 0, then the best of all again.

    No plan is worse than one before it, in makespan or in objective. Raises PlanError as ``ClusterView.check``.
    """
    rest = (1 - GREEDY_SHARE) * seconds_left()
    made = _Plans(Problem(view), lambda: seconds_left() - rest)
    yield made.plan("greedy", "not asked")
    if not made.problem.classes:
        return
    origin: Origin = "greedy"
    status = "no time"
    for found in improve(made.problem, made.flows, solve, seconds_left, max_flows):
        status = found.status
        if made.take(found):
            origin = "solver"
            yield made.plan(origin, status)
    yield made.plan(origin, status)


class _Plans:
    """Plans of one problem, all of them with the greedy plan's figures."""

    def __init__(self, problem: Problem, seconds_left: Callable[[], float]) -> None:
        self.problem = problem
        self._before = problem.finishing_times(problem.stay)
        self.flows = self._no_worse(greedy(problem, seconds_left).flows)
        self._greedy = problem.finishing_times(self.flows)
        self._objective = problem.objective(self._greedy)

    def plan(self, origin: Origin, status: str) -> MigrationPlan:
        problem, flows = self.problem, self.flows
        after = problem.finishing_times(flows)
        moves = list(_moves(problem, flows))
        return MigrationPlan(
            moves=moves,
            steps=adapter_steps(problem, flows),
            origin=origin if moves else "stay",
            status=status,
            before=problem.makespan(self._before),
            after=problem.makespan(after),
            greedy=problem.makespan(self._greedy),
            objective=problem.objective(after),
            greedy_objective=problem.objective(self._greedy),
        )

    def take(self, found: Round) -> bool:
        """Take a round's flows if they are better for all: rounds also go on from what helps their group alone."""
        objective = self.problem.objective(found.times)
        if objective >= self._objective - RESOLUTION:
            return False
        self.flows, self._objective = found.flows, objective
        return True

    def _no_worse(self, flows: Flows) -> Flows:
        """``flows``, or nothing moved where that is as good: levelling may cost more work than it is worth."""
        problem = self.problem
        gained = problem.objective(self._before) - problem.objective(problem.finishing_times(flows))
        return flows if gained > RESOLUTION else problem.stay


def _moves(problem: Problem, flows: Flows) -> Iterator[Move]:
    ids = [replica.replica_id for replica in problem.replicas]
    for index, flow in enumerate(flows):
        source, one = problem.source[index], problem.classes[index]
        for replica, count in sorted(flow.items()):
            if replica != source:
                yield Move(index, ids[source], ids[replica], one.adapter, count, problem.way(index, replica))
