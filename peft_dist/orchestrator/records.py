"""What the orchestrator remembers, and what it hands to whoever drives it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import ModelInfo
from peft_dist.core.errors import PeftDistError
from peft_dist.core.messages import AnyCommand, ReplicaDetail, ReplicaStats, SequenceProgress
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.observation import ReplicaTotals


class Outgoing(NamedTuple):
    """A command and the incarnation of the replica it is meant for."""

    replica_id: int
    epoch: int
    command: AnyCommand


class ReplicaState(enum.Enum):
    """Where an incarnation of a replica is in its life; DEAD is for good."""

    STARTING = "starting"
    READY = "ready"
    DEAD = "dead"


@dataclass(slots=True)
class Replica:
    """One replica; ``epoch`` counts incarnations over all replicas, so that no two are alike.

    ``start_deadline`` is the time by which a starting replica must be ready, None for no limit. ``earlier`` is what
    the incarnations before this one counted.
    """

    replica_id: int
    epoch: int
    state: ReplicaState = ReplicaState.STARTING
    start_deadline: float | None = None
    model: ModelInfo | None = None
    pid: int | None = None
    stats: ReplicaStats = field(default_factory=ReplicaStats)
    detail: ReplicaDetail = field(default_factory=ReplicaDetail)
    earlier: ReplicaTotals = field(default_factory=ReplicaTotals)
    error: PeftDistError | None = None


@dataclass(slots=True)
class SequenceRecord:
    """One sequence of a request, on the replica that owns it."""

    sequence_id: str
    index: int
    replica_id: int
    output_token_ids: list[int] = field(default_factory=list)


@dataclass(slots=True)
class RequestRecord:
    """All that any replica needs to go on with a request: prompt, parameters, seed, tokens so far.

    ``unfinished`` holds the sequences that still run, by index.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    adapter: AdapterSpec | None
    arrival_time: float
    unfinished: dict[int, SequenceRecord] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SequenceEvent:
    """New tokens of a sequence, or its end."""

    request_id: str
    sequence_index: int
    progress: SequenceProgress


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """A request ended as a whole, because nothing can continue it."""

    request_id: str
    error: PeftDistError


@dataclass(frozen=True, slots=True)
class AdapterLoaded:
    """A load succeeded: every replica has the adapter."""

    call_id: int
    spec: AdapterSpec


@dataclass(frozen=True, slots=True)
class AdapterRefused:
    """A load failed, and the adapter serves nobody."""

    call_id: int
    error: PeftDistError


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """A replica has loaded its model."""

    replica_id: int
    model: ModelInfo


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """A replica is dead, and why."""

    replica_id: int
    error: PeftDistError


@dataclass(frozen=True, slots=True)
class Notice:
    """Something an operator should read that concerns no request."""

    replica_id: int
    text: str


Event = SequenceEvent | RequestFailed | AdapterLoaded | AdapterRefused | ReplicaReady | ReplicaLost | Notice
