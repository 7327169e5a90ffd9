"""What a planner sees of the cluster, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import msgspec

from peft_dist.core.errors import PeftDistError
from peft_dist.placement.costs import ReplicaCosts

Way = Literal["kv", "recompute"]
StepKind = Literal["load", "copy", "evict"]
Origin = Literal["solver", "greedy", "stay"]
BASE = ""
"""The adapter of requests to the base model: it is everywhere and takes no room."""


class PlanError(PeftDistError, ValueError):
    """A view of the cluster contradicts itself, or a plan does not fit its view."""


class _Frozen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class ReplicaLoad(_Frozen, frozen=True):
    """One replica as a planner sees it.

    Attributes:
        kv_blocks: Blocks of its KV pool, less what it keeps as reserve.
        free_kv_blocks: Of these, blocks that are free now: all that is promised to requests that come.
        adapter_bytes: Device memory for adapters, in bytes.
        backlog: Seconds of work that is in no request class.
        device: Adapters (content hashes) on the device.
        host: Adapters in its host memory, those on the device or not.
        pinned: Adapters that must stay on the device, in use or not.
        accepts: Whether requests and adapters may come here; not while it is drained.
        free_seats: Requests that run may come only to so many: without a seat they would run no more. None: any number.
        free_places: Requests that may come at all; more would wait here no less. None: any number.
        merging: The adapter that it runs merged, or would if no other's requests were here; "" for none.
        mixing: Seconds that it loses by requests of another adapter, for each such adapter.
        is_reserved: Whether requests of other adapters than ``merging`` may not come.
    """

    replica_id: int
    costs: ReplicaCosts
    kv_blocks: int
    free_kv_blocks: int
    adapter_bytes: int
    backlog: float = 0.0
    device: list[str] = []
    host: list[str] = []
    pinned: list[str] = []
    accepts: bool = True
    free_seats: int | None = None
    free_places: int | None = None
    merging: str = ""
    mixing: float = 0.0
    is_reserved: bool = False


class AdapterLoad(_Frozen, frozen=True):
    """Size of an adapter in bytes, and how much is asked of it: ``rate`` requests a second of ``work`` seconds each."""

    adapter: str
    num_bytes: int
    rate: float = 0.0
    work: float = 1.0


class RequestClass(_Frozen, frozen=True):
    """``count`` requests of one adapter on one replica that are about alike; figures are those of one request.

    Attributes:
        prefill_tokens: Tokens yet to be computed before the next output token, where the request is.
        decode_tokens: Output tokens that are still expected.
        context_tokens: Tokens whose KV exists: they are moved, or computed again.
        kv_blocks: Blocks it needs to run.
        kv_bytes: Bytes of KV to move.
    """

    source: int
    adapter: str
    count: int
    prefill_tokens: float
    decode_tokens: float
    context_tokens: float = 0.0
    kv_blocks: int = 0
    kv_bytes: int = 0


_CLASS_NUMBERS = tuple(field for field in RequestClass.__struct_fields__ if field not in ("source", "adapter"))


class ClusterView(_Frozen, frozen=True):
    """The whole input of a plan.

    ``floor``: No replica needs to end sooner than after so many seconds; to have it end sooner is worth nothing.
    """

    replicas: list[ReplicaLoad]
    adapters: list[AdapterLoad]
    classes: list[RequestClass]
    floor: float = 0.0

    def check(self) -> None:
        """Raises PlanError, naming the entry at fault, if something is unknown, there twice, negative or no number."""
        _unique("replica", (r.replica_id for r in self.replicas))
        _unique("adapter", (a.adapter for a in self.adapters))
        _number("floor", self.floor)
        ids, names = {r.replica_id for r in self.replicas}, {a.adapter for a in self.adapters}
        if BASE in names:
            raise PlanError('the adapter "" stands for the base model: leave it out of the adapters')
        for replica in self.replicas:
            _check_replica(replica, names)
        for adapter in self.adapters:
            _numbers(f"adapter {adapter.adapter!r}", adapter, "num_bytes", "rate", "work")
        for index, one in enumerate(self.classes):
            where = f"request class {index}"
            _numbers(where, one, *_CLASS_NUMBERS)
            if one.source not in ids:
                raise PlanError(f"{where} is on replica {one.source}, which is not in the view: its classes go with it")
            if one.adapter != BASE and one.adapter not in names:
                raise PlanError(f"{where} uses adapter {one.adapter!r}, whose size the view does not give")


class Move(_Frozen, frozen=True):
    """``count`` requests of class number ``index`` go to ``target``, with their KV or to be computed again there."""

    index: int
    source: int
    target: int
    adapter: str
    count: int
    way: Way


class AdapterStep(_Frozen, frozen=True):
    """What happens to one adapter on one replica.

    "load" brings it from the replica's host memory, or from disk, to the device; "copy" fetches it from replica
    ``source`` first; "evict" takes it from the device.
    """

    kind: StepKind
    replica: int
    adapter: str
    source: int | None = None


class MigrationPlan(_Frozen, frozen=True):
    """What to do, and what it is expected to bring. Seconds as floats.

    Attributes:
        origin: "solver", "greedy" (the solver found nothing better, or failed), or "stay" (nothing to do).
        status: How the solver ended, in words.
        before: Makespan if nothing moves: the last replica's finishing time, the view's floor at least.
        after: Makespan of this plan.
        greedy: Makespan of the greedy plan.
        objective: What was minimised: makespan, and a little of everybody's finishing time.
        greedy_objective: The same of the greedy plan.
    """

    moves: list[Move]
    steps: list[AdapterStep]
    origin: Origin
    status: str
    before: float
    after: float
    greedy: float
    objective: float
    greedy_objective: float


def _check_replica(replica: ReplicaLoad, names: set[str]) -> None:
    where = f"replica {replica.replica_id}"
    _numbers(where, replica, "kv_blocks", "free_kv_blocks", "adapter_bytes", "backlog", "mixing")
    for field in ("free_seats", "free_places"):
        if (free := getattr(replica, field)) is not None:
            _number(f"{where}: {field}", free)
    if replica.merging and replica.merging not in names:
        raise PlanError(f"{where}: merging names adapter {replica.merging!r}, whose size the view does not give")
    costs = replica.costs
    for field in costs.__struct_fields__:
        value = getattr(costs, field)
        for number in value if isinstance(value, tuple) else (value,):
            if not 0 <= number < math.inf:
                _number(f"{where}: costs.{field}", number)
    if replica.free_kv_blocks > replica.kv_blocks:
        raise PlanError(f"{where}: free_kv_blocks={replica.free_kv_blocks} of kv_blocks={replica.kv_blocks}")
    for field in ("device", "host", "pinned"):
        unknown = set(getattr(replica, field)) - names
        if unknown:
            raise PlanError(f"{where}: {field} names adapter {min(unknown)!r}, whose size the view does not give")


def _unique(kind: str, names: Iterable[object]) -> None:
    seen: set[object] = set()
    for name in names:
        if name in seen:
            raise PlanError(f"{kind} {name!r} is in the view twice")
        seen.add(name)


def _numbers(where: str, entry: msgspec.Struct, *fields: str) -> None:
    for field in fields:
        value = getattr(entry, field)
        # Written out: words are made for what is wrong alone, and a view has thousands of numbers.
        if not 0 <= value < math.inf:
            _number(f"{where}: {field}", value)


def _number(where: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise PlanError(f"{where}={value} must be finite and zero or more")
