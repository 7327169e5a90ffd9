"""What can be seen of the replicas from outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, field

from peft_dist.core.config import ModelInfo
from peft_dist.core.messages import ReplicaDetail, ReplicaStats


@dataclass(frozen=True, slots=True)
class ReplicaTotals:
    """What a replica counted. Sums over all its incarnations never fall, as counters must not."""

    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_merged_steps: int = 0
    num_unmerged_steps: int = 0
    num_switches: int = 0
    switch_seconds: float = 0.0
    num_adapter_loads: int = 0
    num_adapter_evictions: int = 0

    @classmethod
    def of(cls, stats: ReplicaStats, detail: ReplicaDetail) -> ReplicaTotals:
        return cls(
            num_preemptions=stats.num_preemptions,
            prefix_cache_queries=stats.prefix_cache_queries,
            prefix_cache_hits=stats.prefix_cache_hits,
            num_merged_steps=detail.num_merged_steps,
            num_unmerged_steps=detail.num_steps - detail.num_merged_steps,
            num_switches=detail.num_switches,
            switch_seconds=detail.switch_seconds,
            num_adapter_loads=detail.num_adapter_loads,
            num_adapter_evictions=detail.num_adapter_evictions,
        )

    def __add__(self, other: ReplicaTotals) -> ReplicaTotals:
        return ReplicaTotals(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


MOVE_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the buckets in which seconds of moves are counted; one more has what is above."""


@dataclass(frozen=True, slots=True)
class MovesView:
    """What came of moving running requests. Counts never fall.

    Attributes:
        ends: By why ("plan", "drain", "call"), how ("kv", "recompute") and with what end, as ``MoveCounts`` says.
        num_bytes: Of KV, of the requests that moved with it, by the memory in which it lay ("device", "host").
        seconds: How many of them took how long, by bucket; each counted once.
        sum_seconds: Of all of them.
    """

    ends: dict[tuple[str, str, str], int] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)
    seconds: tuple[int, ...] = (0,) * (len(MOVE_SECONDS) + 1)
    sum_seconds: float = 0.0

    def by_way(self, *causes: str) -> dict[str, int]:
        """Requests that got somewhere else, by the way in which they did; of these causes, or of all."""
        ways: dict[str, int] = {}
        for (cause, way, outcome), number in self.ends.items():
            if outcome in ("moved", "recomputed") and (not causes or cause in causes):
                taken = way if outcome == "moved" else "recompute"
                ways[taken] = ways.get(taken, 0) + number
        return ways


@dataclass(frozen=True, slots=True)
class MigrationView:
    """What came of planning so far; seconds as floats. Counts never fall.

    Attributes:
        kind: "rr", "proactive" or "dlora".
        plans: By who made them ("solver", "greedy", "stay" where nothing was to move, "failed"), and why.
        moves: Requests that were moved because of plans, by the way that was taken in the end.
        num_dropped: Planned moves of requests that had ended or moved, or whose target could not take them any more.
        plan_seconds: From the first look at the requests to the last move.
        num_placements: Placements of the adapters that were made.
        live: All moves of running requests, planned or not.
    """

    kind: str
    plans: dict[tuple[str, str], int]
    moves: dict[str, int]
    num_dropped: int
    plan_seconds: float
    num_placements: int
    live: MovesView = MovesView()


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """One replica as it was last heard of.

    Attributes:
        state: "starting", "ready", "draining", "drained" (it has no request left), "dead", or "unreached": it is heard,
            and hears nothing. What ``stats`` and ``detail`` say of now is worth something only while ``is_ready``.
        model: None before it was ready for the first time.
        totals: Counts over all incarnations.
        is_warm: Whether it has compiled and captured all that it does ahead, while there is no request.
        num_restarts: Incarnations before this one.
        coming: Content hashes of adapters that are still on their way to it.
        refused: Content hashes of named adapters that it did not take when it was brought them, and why.
        error: Why the last incarnation that died did; None before.
    """

    replica_id: int
    state: str
    model: ModelInfo | None
    stats: ReplicaStats
    detail: ReplicaDetail
    totals: ReplicaTotals
    is_warm: bool = False
    num_restarts: int = 0
    coming: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def is_ready(self) -> bool:
        """Whether it could serve: new requests, the rest of those it has, or those that come once it is resumed."""
        return self.state in ("ready", "draining", "drained")

    @property
    def can_serve(self) -> bool:
        """Whether it takes requests, for the base and all adapters but those that it refused."""
        return self.state == "ready" and not self.coming

    @property
    def serves_all(self) -> bool:
        """Whether it takes requests for the base and every adapter that is named."""
        return self.can_serve and not self.refused

    def serves(self, content_hash: str) -> bool:
        """Whether it takes requests for an adapter that is named."""
        return self.state == "ready" and content_hash not in self.coming and content_hash not in self.refused


@dataclass(frozen=True, slots=True)
class RollingView:
    """How far a rolling restart is.

    Attributes:
        state: "none" (there was none yet), "running", "done", or "stopped" (``error`` says why).
        stage: Of ``current``: "waiting" for others to serve, "draining", or "starting"; None where none runs.
        current: The replica whose turn it is, or at which it stopped.
        restarted, left: Replicas that serve again, and those whose turn will come, in order.
        skipped: Those that joined: only who started them can start them again.
    """

    state: str = "none"
    stage: str | None = None
    current: int | None = None
    restarted: tuple[int, ...] = ()
    left: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()
    error: str | None = None

    @property
    def is_running(self) -> bool:
        return self.state == "running"
