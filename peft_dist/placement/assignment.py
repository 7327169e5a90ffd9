"""Who is where, and what that costs: kept up to date while requests are moved one step at a time."""

from __future__ import annotations

from collections import Counter

from peft_dist.placement.problem import Flows, Problem

# Below this, seconds are equal: a plan must not depend on the last bit of a sum.
RESOLUTION = 1e-9


class Assignment:
    """Flows of every class, beginning with nobody moved, and the finishing time of every replica."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.flows: Flows = [dict(flow) for flow in problem.stay]
        size = len(problem.replicas)
        self.present: list[set[int]] = [set() for _ in range(size)]
        self.incoming = [0] * size
        self.seated = [0] * size
        self.placed = [0] * size
        self._work = [replica.backlog for replica in problem.replicas]
        self._demand = [0] * size
        self._users: list[Counter[int]] = [Counter() for _ in range(size)]
        self._adapter_bytes = [sum(problem.size[a] for a in pinned) for pinned in problem.pinned]
        for index, flow in enumerate(self.flows):
            for replica, count in flow.items():
                self._enter(index, replica, count)
        self.times = [self._time(replica, self._work[replica], self._demand[replica]) for replica in range(size)]

    def hosts(self, adapter: int, replica: int) -> bool:
        """Whether the adapter is on the replica's device, or coming because of its requests there."""
        return adapter < 0 or adapter in self._users[replica] or adapter in self.problem.on_device[replica]

    def fitting(self, index: int, target: int) -> int:
        """How many more requests of a class the target has room for."""
        problem = self.problem
        one, adapter = problem.classes[index], problem.adapter[index]
        if target != problem.source[index] and not problem.may_go(index, target):
            return 0
        comes = adapter >= 0 and adapter not in self._users[target] and adapter not in problem.pinned[target]
        if comes and self._adapter_bytes[target] + problem.size[adapter] > problem.room[target]:
            return 0
        if target == problem.source[index]:
            return one.count
        room, own = one.count, problem.replicas[target]
        if own.free_seats is not None and problem.needs_seat(index):
            room = own.free_seats - self.seated[target]
        if own.free_places is not None:
            room = min(room, own.free_places - self.placed[target])
        return min(room, (own.free_kv_blocks - self.incoming[target]) // one.kv_blocks) if one.kv_blocks else room

    def without(self, index: int, origin: int) -> float:
        """Finishing time of a replica if all its requests of a class were elsewhere."""
        problem, adapter, count = self.problem, self.problem.adapter[index], self.flows[index][origin]
        left = self._work[origin] - count * problem.request_seconds(index, origin)
        if self._users[origin][adapter] == count:
            left -= problem.load_seconds(adapter, origin)
        return self._time(origin, left, self._demand[origin] - count * problem.classes[index].kv_blocks)

    def after(self, index: int, origin: int, target: int, count: int) -> tuple[float, float]:
        """Finishing times of both replicas if so many requests of a class went from one to the other."""
        problem, adapter = self.problem, self.problem.adapter[index]
        blocks = count * problem.classes[index].kv_blocks
        left = self._work[origin] - count * problem.request_seconds(index, origin)
        if self._users[origin][adapter] == count:
            left -= problem.load_seconds(adapter, origin)
        grown = self._work[target] + count * problem.request_seconds(index, target)
        if adapter not in self._users[target]:
            grown += problem.load_seconds(adapter, target)
        return (
            self._time(origin, left, self._demand[origin] - blocks),
            self._time(target, grown, self._demand[target] + blocks),
        )

    def move(self, index: int, origin: int, target: int, count: int) -> None:
        """Move so many requests of a class, which must be there and fit."""
        self._leave(index, origin, count)
        flow = self.flows[index]
        flow[target] = flow.get(target, 0) + count
        self._enter(index, target, count)
        for replica in (origin, target):
            self.times[replica] = self._time(replica, self._work[replica], self._demand[replica])

    def _enter(self, index: int, replica: int, count: int) -> None:
        problem, adapter = self.problem, self.problem.adapter[index]
        if adapter not in self._users[replica]:
            self._work[replica] += problem.load_seconds(adapter, replica)
            if adapter >= 0 and adapter not in problem.pinned[replica]:
                self._adapter_bytes[replica] += problem.size[adapter]
        self._users[replica][adapter] += count
        self._change(index, replica, count)
        self.present[replica].add(index)

    def _leave(self, index: int, replica: int, count: int) -> None:
        problem, adapter = self.problem, self.problem.adapter[index]
        self._users[replica][adapter] -= count
        if not self._users[replica][adapter]:
            del self._users[replica][adapter]
            self._work[replica] -= problem.load_seconds(adapter, replica)
            if adapter >= 0 and adapter not in problem.pinned[replica]:
                self._adapter_bytes[replica] -= problem.size[adapter]
        self._change(index, replica, -count)
        flow = self.flows[index]
        flow[replica] -= count
        if not flow[replica]:
            del flow[replica]
            self.present[replica].discard(index)

    def _change(self, index: int, replica: int, count: int) -> None:
        blocks = count * self.problem.classes[index].kv_blocks
        self._work[replica] += count * self.problem.request_seconds(index, replica)
        self._demand[replica] += blocks
        if replica != self.problem.source[index]:
            self.incoming[replica] += blocks
            self.placed[replica] += count
            self.seated[replica] += count if self.problem.needs_seat(index) else 0

    def _time(self, replica: int, work: float, demand: int) -> float:
        own = self.problem.replicas[replica]
        return work + own.costs.swap_block * max(0, demand - own.kv_blocks)
