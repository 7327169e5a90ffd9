"""A cluster in virtual time: the live orchestrator and engines, with other clocks, executors and messengers."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.collector import rare_collections
from peft_dist.core.messages import AnyReport, LoadAdapter, Progress, SequenceProgress, Started
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.events import PlacementDue, PlanDue, RequestFailed, SequenceEvent
from peft_dist.orchestrator.migration import FAILED
from peft_dist.orchestrator.records import Outgoing, RequestRecord
from peft_dist.placement.placer import Search
from peft_dist.placement.planning import greedy_plan
from peft_dist.placement.types import ClusterView, MigrationPlan, PlanError
from peft_dist.sim.events import EventQueue
from peft_dist.sim.executor import TOKEN
from peft_dist.sim.replica import SimHardware, SimReplica
from peft_dist.sim.unread import Unread

# After which nothing is due any sooner.
_USUAL = (Progress, Started)


class Arrival(Protocol):
    """A request that comes: seconds from the start, adapter (None: the base), tokens of prompt and answer."""

    @property
    def time(self) -> float: ...
    @property
    def adapter(self) -> str | None: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...


@dataclass(slots=True)
class Outcome:
    """What became of a request. Times in seconds from the start.

    Attributes:
        first, last: Of its tokens; ``ended`` is when its end was told.
        times: Of all its tokens, where they are kept.
        queue: From its arrival to its first step.
        replica: Where its last token was drawn.
    """

    arrival: Arrival
    first: float | None = None
    last: float | None = None
    ended: float | None = None
    tokens: int = 0
    queue: float | None = None
    times: array[float] | None = None
    replica: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class SimCluster:
    """What is simulated.

    Attributes:
        hardware: Of each replica.
        adapters: By name; every replica can run each.
        message_seconds: That a command or report is under way.
        plan_seconds, placement_seconds: From a view to its plan, and to its placement.
        plan: Makes plans; nothing whose answer depends on this machine's speed gives the same run twice.
        token_times: Keep the time of every token.
    """

    hardware: Sequence[SimHardware]
    adapters: Mapping[str, AdapterSpec]
    options: OrchestratorOptions
    message_seconds: float = 2e-4
    plan_seconds: float = 0.05
    placement_seconds: float = 0.2
    plan: Callable[[ClusterView], MigrationPlan] = lambda view: greedy_plan(view, "virtual time")
    token_times: bool = True


class Simulator:
    """One run. It begins when all replicas are ready and hold all adapters, at time 0 of the arrivals.

    Attributes:
        core: The orchestrator.
    """

    def __init__(self, cluster: SimCluster, *, advance: bool = True, by_messages: bool = False) -> None:
        """
        Args:
            advance: Take many equal decode steps at once; the answer is the same.
            by_messages: Whatever replicas report comes as a message, for who notes those; nothing is taken at once.
        """
        self._cluster = cluster
        self._advance = advance
        self._by_messages = by_messages
        self._unread: list[Unread] = []
        self._queue = EventQueue()
        self.core = Orchestrator(cluster.options)
        self.core.room.refresh = self._read_all
        self.replicas: list[SimReplica] = []
        self._outcomes: dict[str, Outcome] = {}
        self._left = 0
        self._start = 0.0
        self._tick_at: float | None = None

    @property
    def seconds(self) -> float:
        """Virtual seconds from the start of the arrivals."""
        return self._queue.now - self._start

    @property
    def num_events(self) -> int:
        return self._queue.num_run

    def run(self, arrivals: Iterable[Arrival]) -> list[Outcome]:
        """Offer requests at their times, whatever becomes of the others; ends with the last of them."""
        # Requests and what became of them are hardly ever garbage.
        with rare_collections():
            return self._run(arrivals)

    def _run(self, arrivals: Iterable[Arrival]) -> list[Outcome]:
        self._set_up()
        self._start = self._queue.now
        for unread in self._unread:
            unread.origin = self._start
        found = [self._outcome(arrival) for arrival in arrivals]
        self._left = len(found)
        self._offer(iter(sorted(enumerate(found), key=lambda one: one[1].arrival.time)))
        if found:
            self._queue.run()
        return found

    def _outcome(self, arrival: Arrival) -> Outcome:
        return Outcome(arrival, times=array("d") if self._cluster.token_times else None)

    def _offer(self, coming: Iterator[tuple[int, Outcome]]) -> None:
        """Have the next request submitted at its time, and then the one after it offered."""
        if (one := next(coming, None)) is None:
            return
        number, outcome = one

        def arrive() -> None:
            self._outcomes[f"r{number}"] = outcome
            self._submit(f"r{number}", outcome.arrival)
            self._offer(coming)

        self._queue.at(self._start + outcome.arrival.time, arrive)

    def _set_up(self) -> None:
        for replica_id, hardware in enumerate(self._cluster.hardware):
            replica = self.core.add_replica(replica_id, self._queue.now)

            drew, refresh = partial(self._note_equal, replica_id), partial(self._read, replica_id)
            steps = self.core.equal_steps(replica, TOKEN, drew, refresh)
            unread = Unread(replica_id, self._cluster.message_seconds, steps)
            self._unread.append(unread)
            told = self._reporter(replica_id, replica.epoch)
            equal = None if self._by_messages else unread.add
            self.replicas.append(
                SimReplica(hardware, self._queue, told, self._spec, replica_id, equal, advance=self._advance)
            )
        self._queue.run(lambda: len(self.core.replicas.ready()) == len(self.replicas))
        for name in self._cluster.adapters:
            self._act(self.core.load_adapter(name, name)[1])
        self._queue.run(lambda: len(self.core.adapters.specs()) == len(self._cluster.adapters))

    def _spec(self, load: LoadAdapter) -> AdapterSpec:
        return self._cluster.adapters[load.name]

    def _reporter(self, replica_id: int, epoch: int) -> Callable[[list[AnyReport]], None]:
        def arrive(reports: list[AnyReport]) -> None:
            for report in reports:
                is_usual = isinstance(report, _USUAL)
                if isinstance(report, Progress):
                    ids = [one.request_id for one in report.sequences]
                    self._unread[replica_id].part(ids, self._queue.now, self._queue.lane)
                elif is_usual:
                    self._read(replica_id)
                elif self._outcomes:
                    self._settle()
                commands = self.core.observe(replica_id, epoch, report, self._queue.now)
                if commands or not is_usual:
                    self._act(commands, replica_id)
                else:
                    self._hear(replica_id)

        def send(reports: list[AnyReport]) -> None:
            self._queue.at(self._queue.now + self._cluster.message_seconds, lambda: arrive(reports), replica_id)

        return send

    def _read(self, replica_id: int) -> None:
        """Take in what a replica has said of equal steps, as far as admission needs it."""
        self._unread[replica_id].read(self._queue.now, self._queue.lane)

    def _read_all(self) -> None:
        for unread in self._unread:
            unread.read(self._queue.now, self._queue.lane)

    def _look(self) -> None:
        """The same, for who looks at replicas."""
        for unread in self._unread:
            unread.look(self._queue.now, self._queue.lane)

    def _settle(self) -> None:
        """The same, for who looks at requests."""
        for unread in self._unread:
            unread.settle(self._queue.now, self._queue.lane)

    def _note_equal(self, replica_id: int, record: RequestRecord, times: array[float]) -> None:
        outcome = self._outcomes[record.request_id]
        outcome.last, outcome.replica = times[-1], replica_id
        outcome.tokens += len(times)
        if outcome.times is not None:
            outcome.times.extend(times)

    def _submit(self, request_id: str, arrival: Arrival) -> None:
        params = _params(arrival.output_tokens)
        new = NewRequest(request_id, [0] * arrival.prompt_tokens, params, arrival.adapter)
        self._act(self.core.submit(new, self._queue.now))

    def _act(self, commands: Iterable[Outgoing], reporter: int | None = None) -> None:
        """Send commands and hear what the orchestrator tells, because of a report of the replica ``reporter``."""
        for out in commands:
            take, command = self.replicas[out.replica_id].take, out.command
            self._queue.at(self._queue.now + self._cluster.message_seconds, lambda take=take, c=command: take(c))  # type: ignore[misc]
        self._hear(reporter)
        self._arm()

    def _hear(self, reporter: int | None) -> None:
        for event in self.core.drain_events():
            match event:
                case SequenceEvent(request_id=request_id, progress=progress):
                    self._note(request_id, progress, reporter)
                case RequestFailed(request_id=request_id, error=error):
                    self._fail(request_id, str(error))
                case PlanDue():
                    self._plan()
                case PlacementDue(search=search):
                    self._queue.at(self._queue.now + self._cluster.placement_seconds, partial(self._place, search))

    def _place(self, search: Search) -> None:
        self._look()
        self._act(self.core.migration.placed(search, search.run(), self._queue.now))

    def _arm(self) -> None:
        """Have the deadlines of the orchestrator looked at when they pass."""
        deadline = self.core.next_deadline()
        if deadline < float("inf") and (self._tick_at is None or deadline < self._tick_at):
            self._tick_at = deadline
            self._queue.at(deadline, self._tick)

    def _tick(self) -> None:
        if self._tick_at is not None and self._queue.now >= self._tick_at:
            self._tick_at = None
            self._look()
            self._act(self.core.tick(self._queue.now))

    def _plan(self) -> None:
        self._settle()
        survey = self.core.migration.survey()
        while survey.step():
            pass
        surveyed = survey.result(self._queue.now)
        try:
            plan = self._cluster.plan(surveyed.view)
        except PlanError:
            self._queue.at(self._queue.now, lambda: self.core.migration.planned(FAILED, 0.0, self._queue.now))
            return

        def carry_out() -> None:
            self._settle()
            migration, now = self.core.migration, self._queue.now
            commands = migration.prepare(plan)
            commands += migration.move(migration.chosen(plan, surveyed), surveyed, now)
            migration.planned(plan.origin, self._cluster.plan_seconds, now)
            self._act(commands)

        self._queue.at(self._queue.now + self._cluster.plan_seconds, carry_out)

    def _note(self, request_id: str, progress: SequenceProgress, reporter: int | None) -> None:
        outcome, now = self._outcomes[request_id], self._queue.now - self._start
        if progress.token_ids:
            if outcome.first is None:
                outcome.first = now
                # The replica counts from the arrival, wherever the request was meanwhile, less a message's way.
                outcome.queue = self._cluster.message_seconds + (progress.queue_seconds or 0.0)
            outcome.last, outcome.replica = now, reporter
            if outcome.times is not None:
                outcome.times.extend([now] * len(progress.token_ids))
            outcome.tokens += len(progress.token_ids)
        if progress.finish_reason is not None:
            outcome.error, outcome.ended = progress.error, now
            self._end_one()
            self._tell_table(outcome)

    def _tell_table(self, outcome: Outcome) -> None:
        """The artifact's table learns for how long a request ran: from its first step to its end."""
        table, name = self._cluster.options.table, outcome.arrival.adapter
        if table is not None and name is not None and outcome.queue is not None:
            assert outcome.ended is not None, "it has ended"
            seconds = outcome.ended - outcome.arrival.time - outcome.queue
            table.ended(self._cluster.adapters[name].content_hash, seconds)

    def _fail(self, request_id: str, error: str) -> None:
        outcome = self._outcomes[request_id]
        outcome.error, outcome.ended = error, self.seconds
        self._end_one()

    def _end_one(self) -> None:
        self._left -= 1
        if not self._left:
            self._queue.stop()


@lru_cache(maxsize=4096)
def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
