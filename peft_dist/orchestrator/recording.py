"""Everything that enters the orchestrator from outside, and what it decides, in order: enough to have another one
decide the same again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec

from peft_dist.core.messages import AbortRequest, AddRequest, AnyCommand, AnyReport, ExportRequests, PrefetchAdapter
from peft_dist.core.record_file import End, RecordEntry
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.events import (
    Event,
    PlacementDue,
    PlanDue,
    RequestFailed,
    SequenceEvent,
    StartReplica,
)
from peft_dist.orchestrator.options import OrchestratorOptions
from peft_dist.orchestrator.records import Outgoing, Replica
from peft_dist.placement.aggregation import RequestMove
from peft_dist.placement.placing import Placement
from peft_dist.placement.types import MigrationPlan

FORMAT = 1
PREFIX = "orchestrator"


class Begin(RecordEntry, frozen=True):
    """An orchestrator with these options, whose seed is told."""

    format: int
    options: OrchestratorOptions


class Submit(RecordEntry, frozen=True):
    """As of ``Orchestrator.submit``; so are the next ones, by their names."""

    new: NewRequest
    now: float


class Abort(RecordEntry, frozen=True):
    request_id: str
    now: float
    sequence_index: int | None


class LoadAdapter(RecordEntry, frozen=True):
    name: str
    path: str
    replace: bool
    pinned: bool | None
    source: dict[str, Any]


class UnloadAdapter(RecordEntry, frozen=True):
    name: str


class DrainReplica(RecordEntry, frozen=True):
    replica_id: int
    now: float
    restart: bool


class ResumeReplica(RecordEntry, frozen=True):
    replica_id: int
    now: float


class Drain(RecordEntry, frozen=True):
    pass


class ShutDown(RecordEntry, frozen=True):
    pass


class AddReplica(RecordEntry, frozen=True):
    replica_id: int
    now: float
    start_timeout: float | None


class LoseReplica(RecordEntry, frozen=True):
    replica_id: int
    epoch: int
    reason: str
    now: float
    hangs: bool
    by_link: bool


class Observe(RecordEntry, frozen=True):
    replica_id: int
    epoch: int
    report: AnyReport
    now: float


class Tick(RecordEntry, frozen=True):
    now: float


class Join(RecordEntry, frozen=True):
    """As of ``ReplicaTable.join``."""

    start_deadline: float


class MoveRequest(RecordEntry, frozen=True):
    """As of ``Handover.move``."""

    request_id: str
    replica_id: int
    now: float
    with_kv: bool | None


class ExcuseSilence(RecordEntry, frozen=True):
    """As of ``Lifecycle``, and so is the next one."""

    now: float


class StopRestarts(RecordEntry, frozen=True):
    pass


class Survey(RecordEntry, frozen=True):
    """A look at all requests begins, for a plan."""


class SurveyStep(RecordEntry, frozen=True):
    """Some more of them are looked at."""


class Surveyed(RecordEntry, frozen=True):
    """All were looked at; ``view`` is a digest of what was found."""

    now: float
    view: str


class Plan(RecordEntry, frozen=True):
    """A planner's answer, which was bounded by time and is not found again."""

    plan: MigrationPlan


class Move(RecordEntry, frozen=True):
    """Some of the plan's moves are carried out."""

    moves: list[RequestMove]
    now: float


class Planned(RecordEntry, frozen=True):
    origin: str
    seconds: float
    now: float


class Placed(RecordEntry, frozen=True):
    """What a search for a placement ended with; None: it failed."""

    placement: Placement | None
    now: float


class Sent(msgspec.Struct, frozen=True, array_like=True):
    """A command that was decided on: to whom, what, of which requests or adapter, and a digest of all of it."""

    replica_id: int
    epoch: int
    kind: str
    what: str
    digest: str


class Decided(RecordEntry, frozen=True):
    """What came of the input before it; ``error`` is the name of the one that was raised."""

    sent: list[Sent]
    events: list[str]
    error: str | None = None


Input = (
    Submit
    | Abort
    | LoadAdapter
    | UnloadAdapter
    | DrainReplica
    | ResumeReplica
    | Drain
    | ShutDown
    | AddReplica
    | LoseReplica
    | Observe
    | Tick
    | Join
    | MoveRequest
    | ExcuseSilence
    | StopRestarts
    | Survey
    | SurveyStep
    | Surveyed
    | Plan
    | Move
    | Planned
    | Placed
)
Entry = Begin | Input | Decided | End


def digest(value: Any) -> str:
    """Of anything that can be encoded."""
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()[:16]


def decided(result: Any, events: Iterable[Event], error: str | None = None) -> Decided:
    """Of what a call returned and told."""
    if isinstance(result, Replica):
        return Decided([], [f"replica {result.replica_id}, epoch {result.epoch}"], error)
    if isinstance(result, tuple):
        _, result = result
    sent = [_sent(out) for out in result] if isinstance(result, list) else []
    return Decided(sent, [_told(event) for event in events if not isinstance(event, SequenceEvent)], error)


def _sent(out: Outgoing) -> Sent:
    return Sent(out.replica_id, out.epoch, type(out.command).__name__, _what(out.command), digest(out.command))


def _what(command: AnyCommand) -> str:
    match command:
        case AddRequest(request_id=request_id):
            return request_id
        case AbortRequest(request_ids=ids) | ExportRequests(request_ids=ids):
            return " ".join(ids)
        case PrefetchAdapter(content_hash=content_hash):
            return content_hash
    return ""


def _told(event: Event) -> str:
    name = type(event).__name__
    match event:
        case PlanDue(trigger):
            return f"{name} {trigger}"
        case PlacementDue(search):
            return f"{name} {digest(search)}"
        case RequestFailed(request_id):
            return f"{name} {request_id}"
        case StartReplica(replica_id, epoch):
            return f"{name} {replica_id} {epoch}"
    return name
