"""What replicas say to an orchestrator that began after theirs had gone, and what they keep for it."""

from __future__ import annotations

import msgspec

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import EngineConfig
from peft_dist.core.message_kinds import Command, Report

# Incarnations, loads and handovers of one life of an orchestrator; then its numbers would be those of another.
_NUMBERS_OF_A_LIFE = 20
LIFE_BITS = 40


def first_number(life: int) -> int:
    """The least epoch (or number of a load, or of a handover) of a life, which is a random number of ``LIFE_BITS``."""
    return life << _NUMBERS_OF_A_LIFE | 1


def life_of(epoch: int) -> int:
    """In which life of an orchestrator an epoch was given."""
    return epoch >> _NUMBERS_OF_A_LIFE


class NamedAdapter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the name ``spec.name`` means, and what brings it to a replica that lacks it (as in ``LoadAdapter``)."""

    spec: AdapterSpec
    path: str
    root: str | None = None
    allow_hub: bool = False
    allow_pickle: bool = False
    pinned: bool = False


class NameAdapters(Command, frozen=True, kw_only=True):
    """Remember what names mean, whether or not the replica holds it; answered by ``NamesKept``.

    ``version`` counts the changes of the orchestrator's registry: replicas with the same one remember the same.
    ``given`` names mean something (else) from now on, ``taken`` ones nothing. ``is_whole``: Nor do any others.
    """

    version: int
    given: list[NamedAdapter]
    taken: list[str] = []
    is_whole: bool = False


class NamesKept(Report, frozen=True, kw_only=True):
    """The replica remembers the names as they were at this version."""

    version: int


class KeepDrained(Command, frozen=True, kw_only=True):
    """Remember whether this replica is drained, which is told by ``Ready`` to an orchestrator after this one.

    Answered by ``DrainKept``.
    """

    is_drained: bool


class DrainKept(Report, frozen=True, kw_only=True):
    """The replica remembers it: one answer to each, in their order."""


class Identify(Command, frozen=True, kw_only=True):
    """The sender knows nothing of this epoch, nor of its requests: drop them, and answer with ``Identity``."""


class Adopt(Command, frozen=True, kw_only=True):
    """Be this incarnation from now on; answered by ``Ready`` under its epoch.

    ``heartbeat_seconds``: Between signs of life from now on, None: as before. ``pid``: Process of the orchestrator,
    whose end is watched; None of one that may be on another host.
    """

    replica_id: int
    incarnation: int
    heartbeat_seconds: float | None = None
    pid: int | None = None


class Identity(Report, frozen=True, kw_only=True):
    """Who a replica is that another orchestrator started, or let join.

    Attributes:
        guest: Name of the socket that asked to join for it, None for one that did not join.
        attempt: As in ``Join``.
        engine, replica_factory: What it was told to run, without what its machine has otherwise.
    """

    guest: str | None
    attempt: int
    host: str
    engine: EngineConfig
    replica_factory: str
