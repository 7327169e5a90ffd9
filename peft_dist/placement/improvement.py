"""Better plans from a plan: mixed integer programs over groups of replicas, one after another, while there is time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from peft_dist.placement.assignment import RESOLUTION
from peft_dist.placement.problem import Flows, Problem
from peft_dist.placement.program import Program, Question, build, read
from peft_dist.placement.types import PlanError

Answer = tuple[list[float] | None, str]
"""Values of a program's columns, or None, and how the solver ended."""
Solve = Callable[[Program, float, float], Answer]
"""Solves a program within so many seconds and to a relative gap."""

# Flows that are free in one program: HiGHS finds a solution with about a hundred in some tens of milliseconds.
MAX_FLOWS = 150
# Share of the time that is left which one program may take, where there are several.
SHARE = 0.4
# Of the whole problem the best plan is asked for. A group must end sooner by a part of what its last replica is behind
# its mean, and the first plan that does is as good as any, for more rounds follow.
WHOLE_GAP, GROUP_GAP = 1e-4, 1e-2
# What is asked, and whether adapters may be loaded for it: one stage after the other, as nothing more is found.
STAGES = ((0.25, False), (0.25, True), (0.02, True))
# Where the last replica ends so little after the mean, relatively, no group can gain more.
LEVEL = 1e-4
# In less time nothing is solved.
LEAST_SECONDS = 2e-3


class Round(NamedTuple):
    """What one program brought: flows to go on from with their finishing times, and the solver's words."""

    flows: Flows
    times: list[float]
    status: str


def improve(
    problem: Problem, flows: Flows, solve: Solve, seconds_left: Callable[[], float], max_flows: int = MAX_FLOWS
) -> Iterator[Round]:
    """Rounds of which each has a smaller objective for its group of replicas, or the same flows, and no later makespan.

    With at most ``max_flows`` flows in all, the first round is the whole problem and the last one. Else each round
    takes the replica that ends last and as many others as make a program of that size, those that end first and last
    before others. When no group with the last replica brings what is asked, the next of ``STAGES`` begins; after the
    last one the rounds end.
    """
    times = problem.finishing_times(flows)
    offset, stage = 0, 0
    while any(flows) and (left := seconds_left()) > LEAST_SECONDS:
        group = _group(flows, times, offset, max_flows)
        if len(group) < 2:
            return
        if len(group) == len(times):
            yield _round(problem, flows, times, Question(group), lambda program: solve(program, left, WHOLE_GAP))
            return
        question = Question(group, *STAGES[stage])
        found = _round(problem, flows, times, question, lambda program: solve(program, SHARE * left, GROUP_GAP))
        yield found
        if found.flows is not flows:
            flows, times, offset = found.flows, found.times, 0
        else:
            offset += len(group) - 1
        if offset >= len(times) - 1:
            offset, stage = 0, stage + 1
        if stage == len(STAGES) or _is_level(times) or max(times) <= problem.view.floor:
            return


def _round(
    problem: Problem, flows: Flows, times: list[float], question: Question, solve: Callable[[Program], Answer]
) -> Round:
    """One program. The same ``flows`` come back if its solution is not feasible, or no better for the group."""
    program = build(problem, flows, times, question)
    values, status = solve(program)
    if values is None:
        return Round(flows, times, status)
    found = read(program, flows, values)
    try:
        problem.check_flows(found)
    except PlanError as error:
        return Round(flows, times, f"{status}; refused: {error}")
    new = problem.finishing_times(found)
    gained = _local(problem, times, question.group) - _local(problem, new, question.group)
    if gained <= RESOLUTION or problem.makespan(new) > problem.makespan(times) + RESOLUTION:
        return Round(flows, times, f"{status}; nothing better")
    return Round(found, new, status)


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
