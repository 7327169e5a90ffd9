"""A workload on a profile: what ``peft-dist simulate`` and every simulated figure run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.placement.artifact_moves import ArtifactPlanner
from peft_dist.sim import artifact
from peft_dist.sim.apart import run_apart
from peft_dist.sim.exec_types import effective, find
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.planning import SteadyPlanner
from peft_dist.sim.profile import CostProfile
from peft_dist.sim.simulator import Outcome, SimCluster, Simulator
from peft_dist.workload.arrivals import Arrival
from peft_dist.workload.records import RequestRecord, Run


@dataclass(frozen=True, slots=True)
class ReplicaResult:
    """One replica's part of a run. Seconds are virtual.

    Attributes:
        requests: That drew their last token here.
        queueing, e2e: Seconds of these, together.
        steps, merged_steps: Of the engine; ``step_seconds`` is what all took.
        switches, switch_seconds: Changes of what the weights hold.
        loads, evictions: Of adapters, to the device and off it.
        preemptions: Of requests, for lack of KV blocks.
    """

    replica: int
    requests: int
    queueing: float
    e2e: float
    steps: int
    merged_steps: int
    step_seconds: float
    switches: int
    switch_seconds: float
    loads: int
    evictions: int
    preemptions: int

    @property
    def queueing_share(self) -> float | None:
        """Of end-to-end time; None where nothing ended."""
        return self.queueing / self.e2e if self.e2e else None


@dataclass(frozen=True, slots=True)
class MigrationResult:
    """What planning came to.

    Attributes:
        plans: By who made them and why, as "solver/imbalance".
        plan_seconds: Virtual: assumed for each plan, together.
        moves: Requests moved by plans, by way ("kv", "recompute"); ``dropped`` are planned moves that came too late.
        kv_bytes: Of the requests that moved with their KV.
        placements: Of adapters.
    """

    plans: dict[str, int] = field(default_factory=dict)
    plan_seconds: float = 0.0
    moves: dict[str, int] = field(default_factory=dict)
    dropped: int = 0
    kv_bytes: int = 0
    placements: int = 0


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """One run.

    Attributes:
        records: In the order of the workload.
        replicas: By number.
        migration: Empty with one replica.
        seconds: Virtual, from the start of the workload to the end of its last request.
        source: What was simulated: profile, options, versions; the same for the same run.
        wall_seconds, plan_wall_seconds: What the run, and its plans, took on this machine.
        events: Of the simulator.
    """

    records: tuple[RequestRecord, ...]
    replicas: tuple[ReplicaResult, ...]
    migration: MigrationResult
    seconds: float
    source: dict[str, Any]
    wall_seconds: float
    plan_wall_seconds: float
    events: int

    @property
    def switch_seconds(self) -> float:
        """Of the replica that switched longest, as the artifact counts them."""
        return max(replica.switch_seconds for replica in self.replicas)

    def run(self, workload: dict[str, Any], versions: Mapping[str, str]) -> Run:
        """For files: nothing in it depends on this machine's speed. ``workload``: its source."""
        found = {
            "replicas": [{**asdict(one), "queueing_share": one.queueing_share} for one in self.replicas],
            "migration": asdict(self.migration),
            "seconds": self.seconds,
        }
        return Run(self.records, {"workload": workload, **self.source, "versions": dict(versions), "found": found})


def simulate(
    rows: Iterable[Arrival], profile: CostProfile, options: SimulationOptions | None = None
) -> SimulationResult:
    """Put requests to simulated replicas, each at its time.

    Args:
        rows: Requests in the order of their times, such as ``Workload.arrivals``. Their adapters, and those that the
            options name, are known to all replicas when the first request comes.
        profile: What everything takes.
        options: The cluster; None is one replica.

    Raises:
        ConfigError: The options contradict themselves or the profile.
    """
    options = effective(options or SimulationOptions())
    arrivals = list(rows)
    kind = find(options.exec_type)
    if kind.is_apart and options.replicas > 1:
        names = _named(arrivals, options)
        return run_apart(arrivals, names, options, kind.spreads, lambda own, one: simulate(own, profile, one))
    began = time.perf_counter()
    planner = SteadyPlanner(options.plan)
    simulator = Simulator(_cluster(arrivals, profile, options, planner), advance=options.advance)
    outcomes = simulator.run(arrivals)
    wall = time.perf_counter() - began
    return SimulationResult(
        records=tuple(_record(index, outcome, simulator.seconds) for index, outcome in enumerate(outcomes)),
        replicas=tuple(_replica(simulator, number, outcomes) for number in range(options.replicas)),
        migration=_migration(simulator),
        seconds=simulator.seconds,
        source=_source(profile, options),
        wall_seconds=wall,
        plan_wall_seconds=planner.wall_seconds,
        events=simulator.num_events,
    )


def _cluster(
    arrivals: Sequence[Arrival], profile: CostProfile, options: SimulationOptions, planner: SteadyPlanner
) -> SimCluster:
    exec_type = find(options.exec_type)
    options = replace(options, adapters=tuple(_named(arrivals, options)))
    specs = {name: profile.adapter(name, options.ranks.get(name, options.rank)) for name in options.adapters}
    table = artifact.make_table(profile, options, specs) if specs and artifact.is_artifact(exec_type, options) else None
    each = [
        options if table is None else artifact.replica_options(profile, options, table, index)
        for index in range(options.replicas)
    ]
    hardware = [exec_type.hardware(profile, own, index) for index, own in enumerate(each)]
    kind = (exec_type.migration or options.migration) if exec_type.moves else "rr"
    return SimCluster(
        hardware=hardware,
        adapters=specs,
        options=OrchestratorOptions(
            max_num_seqs=hardware[0].config.max_num_seqs,
            max_queue=options.max_queue,
            seed=options.seed,
            migration=kind,
            triggers=options.triggers if table is None else artifact.triggers(options.plan_seconds),
            table=table,
        ),
        message_seconds=profile.message_seconds,
        plan_seconds=options.plan_seconds,
        placement_seconds=options.placement_seconds,
        plan=planner if table is None else planner.timed(ArtifactPlanner(table)),
        token_times=options.token_times,
    )


def _named(arrivals: Sequence[Arrival], options: SimulationOptions) -> list[str]:
    """All adapters, those of the options first."""
    asked = (arrival.adapter for arrival in arrivals if arrival.adapter is not None)
    return list(dict.fromkeys([*options.adapters, *asked]))


def _record(index: int, outcome: Outcome, end: float) -> RequestRecord:
    arrival = outcome.arrival
    return RequestRecord(
        index=index,
        adapter=arrival.adapter,
        scheduled=arrival.time,
        sent=arrival.time,
        first_token=outcome.first,
        finished=outcome.ended if outcome.ended is not None else end,
        prompt_tokens=arrival.prompt_tokens,
        output_tokens=outcome.tokens,
        itl=() if outcome.times is None else tuple(b - a for a, b in itertools.pairwise(outcome.times)),
        queueing=outcome.queue,
        error=outcome.error,
    )


def _replica(simulator: Simulator, number: int, outcomes: Sequence[Outcome]) -> ReplicaResult:
    engine = simulator.replicas[number].engine
    own = [outcome for outcome in outcomes if outcome.replica == number and outcome.error is None]
    adapters = engine.scheduler.adapters
    return ReplicaResult(
        replica=number,
        requests=len(own),
        queueing=sum(outcome.queue or 0.0 for outcome in own),
        e2e=sum((outcome.ended or 0.0) - outcome.arrival.time for outcome in own),
        steps=engine.num_steps,
        merged_steps=engine.num_merged_steps,
        step_seconds=simulator.replicas[number].executor.busy_seconds,
        switches=engine.num_switches,
        switch_seconds=engine.switch_seconds,
        loads=adapters.loads,
        evictions=adapters.evictions,
        preemptions=engine.scheduler.num_preemptions,
    )


def _migration(simulator: Simulator) -> MigrationResult:
    view = simulator.core.migration.view()
    if view is None:
        return MigrationResult()
    return MigrationResult(
        plans={f"{origin}/{why}": count for (origin, why), count in sorted(view.plans.items())},
        plan_seconds=view.plan_seconds,
        moves=dict(sorted(view.moves.items())),
        dropped=view.num_dropped,
        kv_bytes=sum(view.live.num_bytes.values()),
        placements=view.num_placements,
    )


def _source(profile: CostProfile, options: SimulationOptions) -> dict[str, Any]:
    exec_type = find(options.exec_type)
    return {
        "simulated": True,
        "profile": asdict(profile),
        "options": options.told(),
        "exec_type": artifact.told(exec_type, options),
    }
