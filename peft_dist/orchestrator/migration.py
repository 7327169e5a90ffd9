"""When requests are to move, and carrying out what was planned: the part of it that never waits."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from peft_dist.orchestrator.adapter_calls import AdapterCalls
from peft_dist.orchestrator.adapters import AdapterRegistry
from peft_dist.orchestrator.artifact_hosting import ArtifactHosting
from peft_dist.orchestrator.demand import Demand
from peft_dist.orchestrator.events import Event, PlanDue
from peft_dist.orchestrator.hosting import Hosting
from peft_dist.orchestrator.move_counts import PLAN, MoveCounts
from peft_dist.orchestrator.observation import MigrationView
from peft_dist.orchestrator.options import OrchestratorOptions
from peft_dist.orchestrator.records import Outgoing, Replica, ReplicaState, RequestRecord
from peft_dist.orchestrator.replicas import ReplicaTable
from peft_dist.orchestrator.requests import RequestTable
from peft_dist.orchestrator.survey import Survey, Surveyed
from peft_dist.orchestrator.views import Views
from peft_dist.placement.aggregation import RequestMove, pick
from peft_dist.placement.placer import Placer, Search
from peft_dist.placement.placing import Placement
from peft_dist.placement.triggers import Trigger, trigger
from peft_dist.placement.types import MigrationPlan

# However short the pause between two plans may be.
LEAST_CHECK_SECONDS = 0.05
FAILED = "failed"


Mover = Callable[[RequestRecord, Replica, float], list[Outgoing]]
"""Has another replica go on with a request, from now on or when its turn comes."""


class Migration:
    """Looks every second whether to plan (``PlanDue``), and carries plans out. Idle while one replica serves.

    Plans are made elsewhere, from a ``survey``, and take a while: of what they say, what is not true any more is
    dropped. One plan is made at a time.

    Attributes:
        hosting: Where the adapters are placed.
        mover: What moves a request.
        drop_waiting: Forgets the moves whose turn has not come, and returns how many.
    """

    mover: Mover
    drop_waiting: Callable[[], int]

    def __init__(
        self,
        options: OrchestratorOptions,
        requests: RequestTable,
        replicas: ReplicaTable,
        calls: AdapterCalls,
        registry: AdapterRegistry,
        demand: Demand,
        events: list[Event],
        counts: MoveCounts,
    ) -> None:
        self._requests = requests
        self._replicas = replicas
        self._lengths = demand.lengths
        self._views = Views(requests, replicas, registry, calls, demand.rates, options.max_num_seqs, options.triggers)
        self._placer = Placer(options.migration)
        own = (self._placer, self._views, replicas, calls, events)
        self.hosting = (
            Hosting(*own, sends_ahead=options.sends_ahead)
            if options.table is None
            else ArtifactHosting(options.table, requests, *own, sends_ahead=options.sends_ahead)
        )
        self._triggers = options.triggers
        self._events = events
        self._check_at = 0.0
        self._last_plan = -math.inf
        self._planning: Trigger | None = None
        self._plans: Counter[tuple[str, str]] = Counter()
        self._counts = counts
        self._num_dropped = 0
        self._plan_seconds = 0.0
        # What is full, or starves, and is not to be helped is planned for less and less often.
        self._wait = 0.0

    def next_deadline(self) -> float:
        """When ``tick`` has something to do; infinity for never."""
        return self._check_at if len(self._replicas.ready()) > 1 else math.inf

    def tick(self, now: float) -> list[Outgoing]:
        """See whether adapters should be elsewhere, and whether requests should."""
        if now < self.next_deadline():
            return []
        self._check_at = now + max(self._triggers.pause, LEAST_CHECK_SECONDS)
        if self._placer.migrates and self._planning is None and now >= self._last_plan + self._wait:
            since, chance = now - self._last_plan, self._views.chance()
            self._planning = trigger(self._views.summary(), self._waiting(now), since, self._triggers, chance)
            if self._planning is None:
                self._wait = 0.0
            else:
                self._last_plan = now
                self._events.append(PlanDue(self._planning))
        return self.hosting.check(now)

    def survey(self) -> Survey:
        """A look at all requests, for the plan that is due."""
        return Survey(self._requests, self._replicas, self._lengths, self._views)

    def chosen(self, plan: MigrationPlan, surveyed: Surveyed) -> list[RequestMove]:
        """The requests that a plan moves. Raises PlanError where it is no plan of this survey."""
        return pick(plan, surveyed.members)

    def prepare(self, plan: MigrationPlan) -> list[Outgoing]:
        """Send the adapters of a plan ahead of its requests. What is left of the plan before it is out of date."""
        self._num_dropped += self.drop_waiting()
        return self.hosting.carry_out(plan.steps)

    def move(self, moves: Sequence[RequestMove], surveyed: Surveyed, now: float) -> list[Outgoing]:
        """Carry out some of a plan's moves, without those that are out of date."""
        out: list[Outgoing] = []
        for one in moves:
            record = self._requests.get(one.request_id)
            target = self._replicas.get(one.target)
            if record is None or target is None or not self._is_current(record, target, one, surveyed):
                self._num_dropped += 1
                continue
            out += self.mover(record, target, now)
        return out

    def planned(self, origin: str, seconds: float, now: float) -> None:
        """A plan was carried out, or, with ``FAILED``, could not be made."""
        self._plans[origin, self._planning or "period"] += 1
        self._plan_seconds += seconds
        settings, in_vain = self._triggers, origin in (FAILED, "stay") and self._planning != "period"
        self._wait = min(max(2 * self._wait, settings.pause), settings.period) if in_vain else 0.0
        self._planning, self._last_plan = None, now

    def placed(self, search: Search, placement: Placement | None, now: float) -> list[Outgoing]:
        """As ``Hosting.found``."""
        return self.hosting.found(search, placement, now)

    def view(self) -> MigrationView | None:
        """What came of it so far; None with one replica."""
        if len(self._replicas.all()) < 2:
            return None
        live = self._counts.view()
        return MigrationView(
            kind=self._placer.kind,
            plans=dict(self._plans),
            moves=live.by_way(PLAN),
            num_dropped=self._num_dropped,
            plan_seconds=self._plan_seconds,
            num_placements=self.hosting.num_placements,
            live=live,
        )

    def _waiting(self, now: float) -> dict[str, float]:
        """By adapter, for how long its first request has been where it is without being in a batch."""
        oldest: dict[str, float] = {}
        for record in self._requests.waiting():
            oldest.setdefault(record.content_hash, now - record.waits_since)
        return oldest

    def _is_current(self, record: RequestRecord, target: Replica, move: RequestMove, surveyed: Surveyed) -> bool:
        return (
            record.replica_id == move.source
            and record.num_moves == surveyed.num_moves.get(record.request_id)
            and not record.is_suspect
            and target.state is ReplicaState.READY
            and self.hosting.can_run(target, record.content_hash)
        )
