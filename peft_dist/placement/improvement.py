"""Better plans from a plan: mixed integer programs over groups of replicas, one after another, while there is time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from peft_dist.placement.assignment import RESOLUTION
from peft_dist.placement.problem import Flows, Problem
from peft_dist.placement.program import Program, build, read
from peft_dist.placement.types import PlanError

Solve = Callable[[Program, float, float], tuple[list[float] | None, str]]
"""Values of a program's columns within so many seconds and to a relative gap, or None, and how the solver ended."""

# Flows that are free in one program: HiGHS finds a solution with about a hundred in some tens of milliseconds.
MAX_FLOWS = 150
# Share of the time that is left which one program may take, where there are several.
SHARE = 0.4
# Of the whole problem the best plan is asked for. A group must end sooner by this part of what its last replica is
# behind its mean, and the first plan that does is as good as any, for more rounds follow.
WHOLE_GAP, GROUP_GAP = 1e-4, 1e-2
ASK = 0.25
# Where the last replica ends so little after the mean, relatively, no group can gain more.
LEVEL = 1e-4
# In less time nothing is solved.
LEAST_SECONDS = 2e-3


class Round(NamedTuple):
    """What one program brought: the best flows so far, whether they are better than before, and the solver's words."""

    flows: Flows
    better: bool
    status: str


def improve(
    problem: Problem, flows: Flows, solve: Solve, seconds_left: Callable[[], float], max_flows: int = MAX_FLOWS
) -> Iterator[Round]:
    """Rounds that never make ``flows`` worse; those that are better have a smaller objective and no later makespan.

    With at most ``max_flows`` flows in all, the first round is the whole problem and the last one. Else each round
    takes the replica that ends last and as many others as make a program of that size, those that end first and last
    before others, and the rounds end when no group with the last replica brings anything.
    """
    times = problem.finishing_times(flows)
    offset = 0
    while any(flows) and (left := seconds_left()) > LEAST_SECONDS:
        group = _group(flows, times, offset, max_flows)
        if len(group) < 2:
            return
        whole = len(group) == len(times)
        program = build(problem, flows, times, group, 0.0 if whole else ASK)
        values, status = solve(program, left, WHOLE_GAP) if whole else solve(program, SHARE * left, GROUP_GAP)
        found, ended = _accepted(problem, program, flows, times, group, values)
        if found is None:
            yield Round(flows, False, f"{status}{ended}")
            offset += len(group) - 1
        else:
            new = problem.finishing_times(found)
            better = problem.objective(new) < problem.objective(times) - RESOLUTION
            flows, times, offset = found, new, 0
            yield Round(flows, better, status)
        if whole or offset >= len(times) - 1 or _is_level(times):
            return


def _accepted(
    problem: Problem, program: Program, flows: Flows, times: list[float], group: list[int], values: list[float] | None
) -> tuple[Flows | None, str]:
    """The solution's flows if they are feasible and better for the group, and no worse for all."""
    if values is None:
        return None, ""
    found = read(program, flows, values)
    try:
        problem.check_flows(found)
    except PlanError as error:
        return None, f"; refused: {error}"
    new = problem.finishing_times(found)
    gained = _local(problem, times, group) - _local(problem, new, group)
    if gained <= RESOLUTION or max(new) > max(times) + RESOLUTION:
        return None, "; nothing better"
    return found, ""


def _local(problem: Problem, times: list[float], group: list[int]) -> float:
    return problem.objective([times[replica] for replica in group])


def _group(flows: Flows, times: list[float], offset: int, max_flows: int) -> list[int]:
    """The replica that ends last, and others from the ``offset``-th of a row on: first, last but one, second, ..."""
    last, *rest = sorted(range(len(times)), key=times.__getitem__, reverse=True)
    row = []
    while rest:
        row.append(rest.pop())
        if rest:
            row.append(rest.pop(0))
    present: list[set[int]] = [set() for _ in times]
    for index, flow in enumerate(flows):
        for replica in flow:
            present[replica].add(index)
    group, classes = [last], set(present[last])
    for replica in row[offset:] + row[:offset]:
        grown = classes | present[replica]
        if len(group) >= 2 and len(grown) * (len(group) + 1) > max_flows:
            break
        group.append(replica)
        classes = grown
    return group


def _is_level(times: list[float]) -> bool:
    return max(times) * len(times) <= (1 + LEVEL) * sum(times)
