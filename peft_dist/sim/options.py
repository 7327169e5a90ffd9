"""What is simulated, in the words of the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from peft_dist.core.config import MergeMethod
from peft_dist.core.errors import ConfigError
from peft_dist.placement.placer import KINDS, MigrationKind
from peft_dist.placement.triggers import TriggerSettings

PlanMethod = Literal["solver", "greedy"]


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """One run. None takes the profile's figure.

    Attributes:
        replicas: How many.
        exec_type: "dlora", or a baseline (``exec_types.EXEC_TYPES``).
        policy: "credit", "merge" or "fcfs"; None is what the execution type takes.
        migration: "rr", "proactive" or "dlora".
        rank: Of each adapter, unless ``ranks`` has it by name.
        adapters: Adapters beside those that are asked for, which take part in the placement.
        merge: "off" has no merged execution; "host" merges in place, whatever the profile keeps.
        merged_minority: Let others join merged batches, corrected by the LoRA kernel.
        policy_profile: "artifact" for the constants and rules of the paper's, of batches and of the cluster
            (``artifact.py``).
        max_adapter_wait: Seconds that a request may be overtaken; infinite for no bound.
        max_loras, max_num_seqs, max_num_batched_tokens, num_blocks, depth: As of the profile.
        host_blocks: KV blocks in host memory; with any, KV is preempted to them, else computed again.
        plan: Plans of moves by the "solver" (HiGHS, bounded by its work and not by time) or "greedy" alone.
        plan_seconds, placement_seconds: Assumed from a look at the cluster to its plan, and to a placement.
        moves_kv: Whether running requests may move with their KV; else they are computed again.
        triggers: When moves are planned.
        max_queue: Sequences that may wait beyond those that run.
        learns: Whether engines learn their costs; else they know the profile's. With a profile whose steps take
            exactly what it says the two differ by roundings, which may decide between equals.
        seed: Of the orchestrator. The workload has its own.
        advance: Take decode steps that are certain to be alike at once; the answer is the same, sooner.
        token_times: Keep the time of every token, for ``itl``: 8 bytes each, and more in the records.
    """

    replicas: int = 1
    exec_type: str = "dlora"
    policy: str | None = None
    migration: MigrationKind = "dlora"
    rank: int = 16
    ranks: Mapping[str, int] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    merge: MergeMethod = "auto"
    merged_minority: bool = False
    policy_profile: str = "default"
    max_adapter_wait: float | None = None
    max_loras: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_blocks: int | None = None
    host_blocks: int | None = None
    depth: int | None = None
    plan: PlanMethod = "solver"
    plan_seconds: float = 0.2
    placement_seconds: float = 0.2
    moves_kv: bool = True
    triggers: TriggerSettings = field(default_factory=TriggerSettings)
    max_queue: int = 1 << 30
    learns: bool = False
    seed: int = 0
    advance: bool = True
    token_times: bool = True

    def __post_init__(self) -> None:
        for name, rank in [("rank", self.rank), *self.ranks.items()]:
            if rank < 1:
                raise ConfigError(f"the rank {rank} of {name}: it must be 1 or more")
        for name, least in (("replicas", 1), ("seed", 0), ("max_queue", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} of a simulation must be {least} or more")
        for name in ("plan_seconds", "placement_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)} must be seconds of 0 or more")
        for name, known in (("migration", KINDS), ("plan", get_args(PlanMethod))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}={getattr(self, name)!r} is unknown: use {', '.join(known)}")

    def told(self) -> dict[str, object]:
        """For results: what was given, without what the profile decides and what changes no answer.

        An infinite bound is "inf", because JSON has no such number.
        """
        given = dataclasses.asdict(self)
        del given["advance"]
        return {name: "inf" if value == math.inf else value for name, value in given.items() if value is not None}
