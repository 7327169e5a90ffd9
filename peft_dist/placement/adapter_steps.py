"""Loads, copies and evictions that make room for what a plan, or a placement, wants on each device."""

from __future__ import annotations

from peft_dist.placement.problem import Flows, Problem
from peft_dist.placement.types import AdapterStep


def adapter_steps(problem: Problem, flows: Flows) -> list[AdapterStep]:
    """Steps that bring every adapter that comes with its requests to its new replica.

    Adapters of requests that stay are their replica's own business: they are loaded when their turn comes.
    """
    wanted: list[set[int]] = [set() for _ in problem.replicas]
    staying: list[set[int]] = [set() for _ in problem.replicas]
    for index, flow in enumerate(flows):
        for replica in flow:
            own = staying if replica == problem.source[index] else wanted
            if problem.adapter[index] >= 0:
                own[replica].add(problem.adapter[index])
    steps = []
    for replica, adapters in enumerate(wanted):
        steps += steps_to(problem, replica, adapters, staying[replica])
    return steps


def steps_to(problem: Problem, replica: int, wanted: set[int], busy: set[int]) -> list[AdapterStep]:
    """Evictions first, then loads, so that ``wanted`` adapters get on one device; no more than fit in.

    Args:
        problem: The cluster.
        replica: Number of the replica.
        wanted: Adapters to have on the device.
        busy: Adapters on it that others use, evicted by nobody; pinned ones are kept too.
    """
    own, here, adapters = problem.replicas[replica], problem.on_device[replica], problem.view.adapters
    # What is asked for most, and is dearest to get again, comes first and goes last.
    coming = sorted(wanted - here, key=lambda a: (-_worth(problem, a, replica), a))
    leaving = sorted(here - problem.pinned[replica] - wanted - busy, key=lambda a: (_worth(problem, a, replica), a))
    free = own.adapter_bytes - sum(problem.size[a] for a in here)
    evictions, loads = [], []
    for adapter in coming:
        need, victims = problem.size[adapter] - free, 0
        while need > 0 and victims < len(leaving):
            need -= problem.size[leaving[victims]]
            victims += 1
        if need > 0:
            continue
        evictions += [AdapterStep("evict", own.replica_id, adapters[one].adapter) for one in leaving[:victims]]
        leaving, free = leaving[victims:], -need
        loads.append(_load(problem, adapter, replica))
    return evictions + loads


def _load(problem: Problem, adapter: int, replica: int) -> AdapterStep:
    name, own_id = problem.view.adapters[adapter].adapter, problem.replicas[replica].replica_id
    source = None if adapter in problem.on_host[replica] else _holder(problem, adapter)
    return AdapterStep("load" if source is None else "copy", own_id, name, source)


def _worth(problem: Problem, adapter: int, replica: int) -> float:
    """Seconds of loading a second that having the adapter on the device saves."""
    load = problem.replicas[replica].costs.load
    return problem.view.adapters[adapter].rate * (load[0] + load[1] * problem.size[adapter])


def _holder(problem: Problem, adapter: int) -> int | None:
    """Some replica that has the adapter in its host memory; of several the one with the least backlog."""
    holders = [r for r in range(len(problem.replicas)) if adapter in problem.on_host[r]]
    if not holders:
        return None
    return problem.replicas[min(holders, key=lambda r: (problem.replicas[r].backlog, r))].replica_id
