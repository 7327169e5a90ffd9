"""Which requests move by the rules of dLoRA's artifact: between two replicas, with their adapters.

Written from a description of it. Its program has a share of each request for each of the two replicas, rounded to the
larger one; here requests of one adapter that are about alike are whole numbers. Where plans are equally good the one
that changes less is taken, which the artifact leaves to its solver. Of its programs' errors none is repeated:
seconds are those of the right adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from peft_dist.placement.artifact import BUS, ArtifactTable
from peft_dist.placement.program import INFINITY, Program
from peft_dist.placement.types import BASE, AdapterStep, ClusterView, MigrationPlan, Move

FULL = 0.9
"""Share of its KV blocks from which a replica is full."""
AHEAD = 16
"""Requests above the mean from which a replica has too many."""
MOVE = 0.05
"""Seconds that each moved request costs."""
# So little that it decides between equals alone.
_TIE = 1e-6
# Of branch and bound: the answer is the same on every machine.
MAX_NODES = 200
_GAP = 1e-4


def pair(view: ClusterView) -> tuple[int, int] | None:
    """Numbers of the replica that has too much, and of the one that it shares with; None while all is well."""
    size = len(view.replicas)
    number = {replica.replica_id: index for index, replica in enumerate(view.replicas)}
    blocks, counts = [0] * size, [0] * size
    for one in view.classes:
        blocks[number[one.source]] += one.count * one.kv_blocks
        counts[number[one.source]] += one.count

    def is_full(replica: int) -> bool:
        return blocks[replica] >= FULL * view.replicas[replica].kv_blocks

    most, least = max(range(size), key=blocks.__getitem__), min(range(size), key=blocks.__getitem__)
    if is_full(most) and not is_full(least):
        return most, least
    mean = sum(counts) / size
    most = max(range(size), key=counts.__getitem__)
    if counts[most] - mean < AHEAD:
        return None
    return most, next(replica for replica in range(size) if counts[replica] < mean)


class ArtifactPlanner:
    """Makes plans for a table of hosts: the plan's steps are changes of it."""

    def __init__(self, table: ArtifactTable) -> None:
        self._table = table

    def __call__(self, view: ClusterView) -> MigrationPlan:
        """Raises PlanError for a view that contradicts itself."""
        view.check()
        both = pair(view) if len(view.replicas) > 1 else None
        if both is None:
            return _plan("stay", "no replica has too much")
        problem = _Problem(view, self._table, both)
        from peft_dist.placement.solving import solve

        values, status = solve(problem.program, None, _GAP, MAX_NODES)
        if values is None:
            return _plan("stay", status)
        moves, steps = problem.moves(values), problem.steps(values)
        return _plan("solver" if moves or steps else "stay", status, moves, steps, problem.before, values[0])


def _plan(
    origin: str,
    status: str,
    moves: list[Move] | None = None,
    steps: list[AdapterStep] | None = None,
    before: float = 0.0,
    after: float = 0.0,
) -> MigrationPlan:
    told = {"greedy": before, "objective": after, "greedy_objective": before}
    return MigrationPlan(moves or [], steps or [], origin, status, before=before, after=after, **told)  # type: ignore[arg-type]


@dataclass
class _Problem:
    """The program of two replicas. Column 0 is the time at which the last of them ends.

    Attributes:
        flows: By class and side, the column of the requests that are there in the end.
        placed: By adapter and side, the column that says whether it is there.
    """

    view: ClusterView
    table: ArtifactTable
    both: tuple[int, int]
    program: Program = field(default_factory=Program)
    flows: dict[tuple[int, int], int] = field(default_factory=dict)
    placed: dict[tuple[str, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ids = [self.view.replicas[number].replica_id for number in self.both]
        self.classes = [index for index, one in enumerate(self.view.classes) if one.source in self.ids and one.count]
        self.program.column(1.0, 0.0, INFINITY, integral=False)
        self._add_requests()
        self._add_adapters()
        for side in (0, 1):
            self._add_time(side)

    @property
    def before(self) -> float:
        """When the last one ends if nothing moves."""
        ends = [0.0, 0.0]
        for index in self.classes:
            one = self.view.classes[index]
            ends[self.ids.index(one.source)] += one.count * self.table.seconds(one.adapter)
        return max(ends)

    def _add_requests(self) -> None:
        """Every request is on one of the two."""
        for index in self.classes:
            one = self.view.classes[index]
            for side in (0, 1):
                cost = 0.0 if one.source == self.ids[side] else _TIE
                self.flows[index, side] = self.program.column(cost, 0.0, one.count, integral=True)
            both = [(self.flows[index, side], 1.0) for side in (0, 1)]
            self.program.row(both, one.count, one.count)

    def _add_adapters(self) -> None:
        """A request needs its adapter where it is; each replica has its slots."""
        users: dict[str, list[int]] = {adapter: [] for number in self.ids for adapter in self.table.on(number)}
        for index in self.classes:
            if (adapter := self.view.classes[index].adapter) != BASE:
                users.setdefault(adapter, []).append(index)
        for side, number in enumerate(self.ids):
            present = self.table.on(number)
            for adapter, own in users.items():
                cost = -_TIE / 10 if adapter in present else _TIE / 10
                column = self.placed[adapter, side] = self.program.column(cost, 0.0, 1.0, integral=True)
                count = sum(self.view.classes[index].count for index in own)
                terms = [(self.flows[index, side], -1.0) for index in own]
                self.program.row([(column, float(count)), *terms], 0.0, INFINITY)
            # Requests that came when all its hosts were others' may have more adapters than there are slots.
            here = {a for a, own in users.items() if any(self._is_on(index, side) for index in own)}
            terms = [(self.placed[adapter, side], 1.0) for adapter in users]
            if terms:
                self.program.row(terms, 0.0, max(self.table.slots[number], len(here)))

    def _add_time(self, side: int) -> None:
        """A replica ends when its requests have, with those that come, and with KV beyond its memory on the way."""
        replica = self.view.replicas[self.both[side]]
        overflow = self.program.column(0.0, 0.0, INFINITY, integral=False)
        # Seconds that a block takes to the host.
        block = next((c.kv_bytes / c.kv_blocks for c in self.view.classes if c.kv_bytes and c.kv_blocks), 0.0) / BUS
        time, memory = [(0, 1.0), (overflow, -1.0)], [(overflow, 1.0)]
        for index in self.classes:
            one, column = self.view.classes[index], self.flows[index, side]
            moved = 0.0 if self._is_on(index, side) else MOVE
            time.append((column, -self.table.seconds(one.adapter) - moved))
            memory.append((column, -block * one.kv_blocks))
        self.program.row(time, 0.0, INFINITY)
        self.program.row(memory, -block * replica.kv_blocks, INFINITY)

    def _is_on(self, index: int, side: int) -> bool:
        return self.view.classes[index].source == self.ids[side]

    def moves(self, values: list[float]) -> list[Move]:
        """Requests that end up on the other one; they are computed again there."""
        found = []
        for index in self.classes:
            one = self.view.classes[index]
            side = self.ids.index(one.source)
            if count := round(values[self.flows[index, 1 - side]]):
                move = Move(index, one.source, self.ids[1 - side], one.adapter, count, "recompute")
                found.append(move)
        return found

    def steps(self, values: list[float]) -> list[AdapterStep]:
        """What changes in what the two have."""
        found = []
        for side, replica in enumerate(self.ids):
            wanted = {a for (a, where), column in self.placed.items() if where == side and round(values[column])}
            present = set(self.table.on(replica))
            found += [AdapterStep("evict", replica, adapter) for adapter in sorted(present - wanted)]
            found += [AdapterStep("load", replica, adapter) for adapter in sorted(wanted - present)]
        return found
