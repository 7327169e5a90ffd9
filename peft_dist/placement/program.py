"""The migration problem as a mixed integer program with integer flows, one for each class and target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from peft_dist.placement.problem import Flows, Problem

INFINITY = float("inf")
SLACK = 1e-9


@dataclass(slots=True)
class Program:
    """Minimise ``cost @ x`` for ``row_lower <= A @ x <= row_upper``, with A given by its entries.

    ``flows`` are the columns that are flows: (column, class, replica). Column 0 is the makespan.
    """

    cost: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    integral: list[int] = field(default_factory=list)
    row_lower: list[float] = field(default_factory=list)
    row_upper: list[float] = field(default_factory=list)
    entries: list[tuple[int, int, float]] = field(default_factory=list)
    flows: list[tuple[int, int, int]] = field(default_factory=list)

    def column(self, cost: float, lower: float, upper: float, integral: bool) -> int:
        self.cost.append(cost)
        self.lower.append(lower)
        self.upper.append(upper)
        self.integral.append(int(integral))
        return len(self.cost) - 1

    def row(self, terms: list[tuple[int, float]], lower: float, upper: float) -> None:
        self.entries.extend((len(self.row_lower), column, value) for column, value in terms)
        self.row_lower.append(lower)
        self.row_upper.append(upper)


@dataclass(frozen=True, slots=True)
class Question:
    """What a program is to find.

    Attributes:
        group: Replicas among which requests are arranged anew, all that are there; the others keep theirs.
        ask: How much sooner the group must end at least, as a part of what its last replica is behind its mean.
        loads: Whether requests may go to replicas without their adapter. Loads make programs ten times as slow.
    """

    group: list[int]
    ask: float = 0.0
    loads: bool = True


def build(problem: Problem, flows: Flows, times: list[float], question: Question) -> Program:
    """The program of a question about ``flows``, whose finishing times ``times`` are: they bound the makespan."""
    return _Builder(problem, flows, times, question).program


class _Builder:
    def __init__(self, problem: Problem, flows: Flows, times: list[float], question: Question) -> None:
        self.problem, self.program, group = problem, Program(), question.group
        # A little above: the sum of a solver's own row may differ from ours in its last bits.
        last, mean = max(times[r] for r in group), sum(times[r] for r in group) / len(group)
        most = max(last - question.ask * (last - mean), problem.view.floor) * (1 + SLACK) + SLACK
        self.program.column(1.0, max(*map(self._backlog, group), problem.view.floor), most, False)
        self._time: dict[int, list[tuple[int, float]]] = {replica: [] for replica in group}
        self._blocks: dict[int, list[tuple[int, float]]] = {replica: [] for replica in group}
        self._incoming: dict[int, list[tuple[int, float]]] = {replica: [] for replica in group}
        self._seated: dict[int, list[tuple[int, float]]] = {replica: [] for replica in group}
        self._placed: dict[int, list[tuple[int, float]]] = {replica: [] for replica in group}
        self._users: dict[int, dict[int, list[tuple[int, int]]]] = {replica: {} for replica in group}
        hosted = None if question.loads else self._hosted(flows)
        for index, flow in enumerate(flows):
            inside = {replica: count for replica, count in flow.items() if replica in self._time}
            if inside:
                self._class(index, sorted({*self._targets(index, hosted), *inside}), sum(inside.values()))
        for replica in group:
            self._replica(replica)

    def _hosted(self, flows: Flows) -> dict[int, set[int]]:
        """Adapters on each device of the group, or coming there."""
        hosted = {replica: {-1} | self.problem.on_device[replica] for replica in self._time}
        for index, flow in enumerate(flows):
            for replica in flow.keys() & hosted.keys():
                hosted[replica].add(self.problem.adapter[index])
        return hosted

    def _targets(self, index: int, hosted: dict[int, set[int]] | None) -> Iterator[int]:
        problem, adapter = self.problem, self.problem.adapter[index]
        for replica in self._time:
            home = replica == problem.source[index]
            if home or (problem.may_go(index, replica) and (hosted is None or adapter in hosted[replica])):
                yield replica

    def _backlog(self, replica: int) -> float:
        return self.problem.replicas[replica].backlog

    def _class(self, index: int, targets: list[int], count: int) -> None:
        problem = self.problem
        adapter, kv_blocks = problem.adapter[index], float(problem.classes[index].kv_blocks)
        columns = []
        for replica in targets:
            work = problem.request_seconds(index, replica)
            column = self.program.column(problem.mean_weight * work, 0, count, True)
            self.program.flows.append((column, index, replica))
            columns.append((column, 1.0))
            self._time[replica].append((column, work))
            if kv_blocks:
                self._blocks[replica].append((column, kv_blocks))
            if kv_blocks and replica != problem.source[index]:
                self._incoming[replica].append((column, kv_blocks))
            if replica != problem.source[index]:
                self._placed[replica].append((column, 1.0))
                self._seated[replica] += [(column, 1.0)] if problem.needs_seat(index) else []
            if adapter >= 0 or problem.load_seconds(adapter, replica):
                self._users[replica].setdefault(adapter, []).append((column, count))
        self.program.row(columns, count, count)

    def _replica(self, replica: int) -> None:
        self._adapters(replica)
        self._overflow(replica)
        self._at_most(self._incoming[replica], self.problem.replicas[replica].free_kv_blocks)
        own = self.problem.replicas[replica]
        for terms, free in ((self._seated[replica], own.free_seats), (self._placed[replica], own.free_places)):
            if free is not None:
                self._at_most(terms, free)
        self.program.row([(0, -1.0), *self._time[replica]], -INFINITY, -self._backlog(replica))

    def _adapters(self, replica: int) -> None:
        """A column for each adapter that may have to be loaded here, or that competes for room."""
        problem, program, pinned = self.problem, self.program, self.problem.pinned[replica]
        left = problem.room[replica] - sum(problem.size[adapter] for adapter in pinned)
        using = (adapter for adapter in self._users[replica] if adapter >= 0 and adapter not in pinned)
        sizes = {adapter: problem.size[adapter] for adapter in using}
        scarce = sum(sizes.values()) > left
        terms = []
        for adapter, users in self._users[replica].items():
            load, size = problem.load_seconds(adapter, replica), sizes.get(adapter, 0)
            if not load and not (scarce and size):
                continue
            there = program.column(problem.mean_weight * load, 0, 1, True)
            self._time[replica].append((there, load))
            if size:
                terms.append((there, float(size)))
            for column, count in users:
                program.row([(column, 1.0), (there, -float(count))], -INFINITY, 0)
        if scarce:
            self._at_most(terms, left)

    def _overflow(self, replica: int) -> None:
        own, terms = self.problem.replicas[replica], self._blocks[replica]
        swap = own.costs.swap_block
        if not swap or sum(blocks * self.program.upper[column] for column, blocks in terms) <= own.kv_blocks:
            return
        beyond = self.program.column(self.problem.mean_weight * swap, 0, INFINITY, False)
        self._time[replica].append((beyond, swap))
        self.program.row([*terms, (beyond, -1.0)], -INFINITY, own.kv_blocks)

    def _at_most(self, terms: list[tuple[int, float]], most: int) -> None:
        """A row, scaled to 1, unless it holds anyhow."""
        if sum(value * self.program.upper[column] for column, value in terms) > most:
            unit = max(most, 1)
            self.program.row([(column, value / unit) for column, value in terms], -INFINITY, most / unit)


def read(program: Program, flows: Flows, values: list[float]) -> Flows:
    """``flows`` with those of the program replaced by a solution's, rounded: solvers keep integers to a tolerance."""
    free = {(index, replica) for _, index, replica in program.flows}
    found = [{r: count for r, count in flow.items() if (index, r) not in free} for index, flow in enumerate(flows)]
    for column, index, replica in program.flows:
        count = round(values[column])
        if count:
            found[index][replica] = count
    return found
