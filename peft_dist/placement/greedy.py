"""The greedy plan: part who keeps others from being merged, then relieve who would finish last, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from peft_dist.placement.assignment import RESOLUTION, Assignment
from peft_dist.placement.problem import Problem

# Targets that are tried for each class: those that finish first, and of those with its adapter the same.
NUM_TARGETS = 3


@dataclass(frozen=True, slots=True)
class _Step:
    finish: float
    index: int
    target: int
    count: int


def greedy(problem: Problem, seconds_left: Callable[[], float] = lambda: math.inf) -> Assignment:
    """Move requests from the replica that finishes last until no move lets both it and the target end sooner.

    Before that, requests leave replicas that would run another adapter merged but for them, where that gains more than
    it takes (``_part``). Of the rest every move lowers the later of two finishing times, so that it ends, and the
    makespan never rises above that of moving nothing, or above the floor. So it can stop after any move, and does when
    ``seconds_left()`` is not above 0.
    """
    found = Assignment(problem)
    _part(found, seconds_left)
    for _ in range(4 * sum(one.count for one in problem.classes)):
        if seconds_left() <= 0:
            break
        last = max(range(len(found.times)), key=found.times.__getitem__)
        if found.times[last] <= problem.view.floor:
            break
        step = _best_step(found, last)
        if step is None:
            break
        found.move(step.index, last, step.target, step.count)
    return found


def targets_of(found: Assignment, index: int, ranked: list[int], limit: int = NUM_TARGETS) -> list[int]:
    """Replicas worth trying for a class, of ``ranked`` ones: the first, and the first that host its adapter."""
    if len(ranked) <= limit:
        return ranked
    adapter = found.problem.adapter[index]
    chosen = ranked[:limit]
    hosting = 0
    for replica in ranked:
        if hosting == limit:
            break
        if found.hosts(adapter, replica):
            hosting += 1
            if replica not in chosen:
                chosen.append(replica)
    return chosen


def _best_step(found: Assignment, last: int) -> _Step | None:
    times = found.times
    ranked = sorted((r for r in found.problem.accepting if r != last), key=times.__getitem__)
    best: _Step | None = None
    # By how soon the replica would end without all of them: what comes after a better step than that is no better.
    for least, index in sorted((found.without(index, last), index) for index in found.present[last]):
        if best is not None and least >= best.finish - RESOLUTION:
            break
        for target in targets_of(found, index, ranked):
            # Not even without the requests' own time would this end sooner.
            if times[target] >= (best.finish if best else times[last]) - RESOLUTION:
                continue
            step = _step(found, index, last, target)
            if step is not None and (best is None or step.finish < best.finish - RESOLUTION):
                best = step
    return best


def _step(found: Assignment, index: int, last: int, target: int) -> _Step | None:
    """As many requests of a class as level both replicas, or one; None when that does not help."""
    problem = found.problem
    room = min(found.flows[index][last], found.fitting(index, target))
    if room < 1:
        return None
    both = problem.request_seconds(index, last) + problem.request_seconds(index, target)
    gap = found.times[last] - found.times[target]
    if not found.hosts(problem.adapter[index], target):
        gap -= problem.load_seconds(problem.adapter[index], target)
    count = room if both <= 0 else max(1, min(room, int(gap / both)))
    finish = max(found.after(index, last, target, count))
    if finish > found.times[last] - RESOLUTION:
        return None
    return _Step(finish, index, target, count)


def _part(found: Assignment, seconds_left: Callable[[], float]) -> None:
    """An adapter's requests leave a replica that loses time by them, if the objective falls and the makespan stays."""
    problem = found.problem
    for origin, merging in enumerate(problem.merging):
        if merging is None or not problem.replicas[origin].mixing:
            continue
        others = {problem.adapter[index] for index in found.present[origin]} - {merging}
        for adapter in sorted(others):
            if seconds_left() <= 0:
                return
            _send_away(found, origin, adapter)


def _send_away(found: Assignment, origin: int, adapter: int) -> None:
    problem, before = found.problem, list(found.times)
    moved: list[tuple[int, int, int]] = []
    for index in sorted(i for i in found.present[origin] if problem.adapter[i] == adapter):
        count = found.flows[index][origin]
        target = _cheapest(found, index, origin, count)
        if target is None:
            break
        found.move(index, origin, target, count)
        moved.append((index, target, count))
    else:
        is_later = problem.makespan(found.times) > problem.makespan(before) + RESOLUTION
        if not is_later and problem.objective(found.times) < problem.objective(before) - RESOLUTION:
            return
    for index, target, count in reversed(moved):
        found.move(index, target, origin, count)


def _cheapest(found: Assignment, index: int, origin: int, count: int) -> int | None:
    """Where so many requests of a class cost least, of equals where least is to do."""
    tried = []
    for target in found.problem.accepting:
        if target != origin and found.fitting(index, target) >= count:
            after = found.after(index, origin, target, count)[1]
            tried.append((after - found.times[target], found.times[target], target))
    return min(tried)[2] if tried else None
