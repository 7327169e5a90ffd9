"""What an orchestrator tells whoever drives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import ModelInfo
from peft_dist.core.errors import PeftDistError
from peft_dist.core.messages import SequenceProgress
from peft_dist.placement.placer import Search
from peft_dist.placement.triggers import Trigger


class SequenceEvent(NamedTuple):
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
class NamesAreKept:
    """Every replica that serves remembers the names of this version: they outlive this process."""

    version: int


@dataclass(frozen=True, slots=True)
class DrainIsKept:
    """A replica remembers whether it is drained: that outlives this process."""

    replica_id: int


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """A replica has loaded its model."""

    replica_id: int
    model: ModelInfo


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """A replica is dead, and why. One that ``hangs`` will not end by itself, nor when it is asked to.

    ``was_asked``: It was drained, and told to end.
    """

    replica_id: int
    error: PeftDistError
    hangs: bool = False
    was_asked: bool = False


@dataclass(frozen=True, slots=True)
class ReplicaRenewed:
    """The connection of an incarnation failed. It is over, and its process is to go on as the one in the table."""

    replica_id: int
    epoch: int
    error: PeftDistError


@dataclass(frozen=True, slots=True)
class ReplicaDrained:
    """A draining replica has no request left. One that ``leaves`` was told to end."""

    replica_id: int
    leaves: bool


@dataclass(frozen=True, slots=True)
class MovesLeft:
    """More requests can leave draining replicas, or a lost one, than go in one call: ``tick`` is due at once."""


@dataclass(frozen=True, slots=True)
class StartReplica:
    """It is time to start this incarnation of a replica, once the process of the one before has ended."""

    replica_id: int
    epoch: int


@dataclass(frozen=True, slots=True)
class PlacementDue:
    """Another placement of the adapters is to be looked for, elsewhere than on the event loop."""

    search: Search


@dataclass(frozen=True, slots=True)
class PlanDue:
    """It is time to plan which requests move, and why."""

    trigger: Trigger


@dataclass(frozen=True, slots=True)
class Notice:
    """Something an operator should read that concerns no request."""

    replica_id: int
    text: str


Event = (
    SequenceEvent
    | RequestFailed
    | AdapterLoaded
    | AdapterRefused
    | NamesAreKept
    | DrainIsKept
    | ReplicaReady
    | ReplicaLost
    | ReplicaRenewed
    | ReplicaDrained
    | MovesLeft
    | StartReplica
    | PlacementDue
    | PlanDue
    | Notice
)
