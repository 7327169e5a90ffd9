"""What an Orchestrator goes by."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace

from peft_dist.core.errors import ConfigError
from peft_dist.core.restarts import RestartPolicy
from peft_dist.core.succession import LIFE_BITS, first_number
from peft_dist.placement.artifact import ArtifactTable
from peft_dist.placement.placer import KINDS, MigrationKind
from peft_dist.placement.triggers import TriggerSettings


@dataclass(frozen=True, slots=True)
class OrchestratorOptions:
    """
    Attributes:
        max_num_seqs: Sequences that one replica runs at once.
        max_queue: Sequences that may wait beyond those; one more is refused.
        seed: Seeds the seeds of requests that bring none; None draws from the system.
        start_timeout: Seconds for a replica that is started again to become ready; None is no limit.
        heartbeat_timeout: Seconds of silence after which a replica counts as hung; None: it may be silent.
        by_network: All replicas are reached over a network, whose cuts are silences too; not only those that joined.
        step_timeout: Seconds that one round of a replica's loop may take; None is no limit.
        max_wait: Seconds that an admitted request waits for a replica, when the one it had is lost.
        handover_timeout: Seconds for moving a running request with its KV, from its turn on; then it goes on where it
            was. One that by its bytes should take more than a quarter of it has more time, up to four times as much.
        max_handovers: Requests that move with their KV from one replica at once; the others run on until their turn.
        max_handover_bytes: Of the KV of these, over all ranks: until it has arrived it is in memory twice. What is more
            by itself is computed again.
        restart: When replicas that died are started again; None is never.
        migration: Where adapters are placed, where their requests may go, and whether those move: "rr", "proactive" or
            "dlora" (docs/placement.md). Of no matter with one replica.
        prefix_caching: Whether replicas keep the KV of prefixes: requests go rather where theirs was computed.
        sends_ahead: Whether replicas are told to load adapters before requests for them come.
        triggers: When requests are planned to move.
        table: Where adapters are and requests go, by the rules of dLoRA's artifact; None: by ours.
        first_number: The least number of incarnations, loads and handovers: replicas that outlive one orchestrator must
            not meet a number again (``core/succession.py``).
    """

    max_num_seqs: int = 256
    max_queue: int = 1024
    seed: int | None = None
    start_timeout: float | None = None
    heartbeat_timeout: float | None = None
    by_network: bool = False
    step_timeout: float | None = None
    max_wait: float = 300.0
    handover_timeout: float = 10.0
    max_handovers: int = 4
    max_handover_bytes: int = 4 << 30
    restart: RestartPolicy | None = None
    migration: MigrationKind = "dlora"
    prefix_caching: bool = False
    sends_ahead: bool = True
    triggers: TriggerSettings = field(default_factory=TriggerSettings)
    table: ArtifactTable | None = None
    first_number: int = 1

    def for_a_life(self, *, by_network: bool = False) -> OrchestratorOptions:
        """The same with numbers that no other life has."""
        return replace(self, by_network=by_network, first_number=first_number(secrets.randbits(LIFE_BITS)))

    def __post_init__(self) -> None:
        if self.max_queue < 0:
            raise ConfigError(f"max_queue={self.max_queue} must be 0 (nothing waits) or more")
        if self.max_handovers < 1:
            raise ConfigError(f"max_handovers={self.max_handovers} must be 1 or more: others wait until it has moved")
        if self.max_handover_bytes < 0:
            raise ConfigError(f"max_handover_bytes={self.max_handover_bytes} must be 0 (no KV is moved) or more")
        if self.migration not in KINDS:
            raise ConfigError(f"migration={self.migration!r} is unknown: use {', '.join(KINDS)}")
        for name in ("start_timeout", "heartbeat_timeout", "step_timeout", "max_wait", "handover_timeout"):
            seconds = getattr(self, name)
            if seconds is not None and not seconds > 0:
                raise ConfigError(f"{name}={seconds} must be seconds above 0")
