"""Clusters that place, dispatch and migrate by the rules of dLoRA's artifact (``placement/artifact.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from peft_dist.core.adapter import AdapterSpec
from peft_dist.placement.artifact import ArtifactSettings, ArtifactTable
from peft_dist.placement.triggers import TriggerSettings
from peft_dist.sim.hardware import ExecType
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile

PERIOD = 10.0
"""Seconds between two looks at whether requests must move."""
SWAP_SPACE = 16 * 2**30
"""Bytes of host memory on each device's side for KV that is preempted: what the artifact's scripts ask for."""
# Plans take their time; a period begins with the look that the plan was made from.
_EARLY = 1e-6
RULES = (
    "placement, dispatch and moves by the artifact's rules: adapters placed once as if asked for alike, requests to "
    "the host with the fewest batches before it, pairs of replicas every 10 s, KV preempted to the host"
)


def is_artifact(exec_type: ExecType, options: SimulationOptions) -> bool:
    """Whether the cluster goes by these rules. Replicas that share nothing have nothing to decide."""
    return not exec_type.is_apart and (exec_type.is_artifact or options.policy_profile == "artifact")


def told(exec_type: ExecType, options: SimulationOptions) -> str:
    """Where costs and rules come from, for results."""
    return f"{exec_type.source}; {RULES}" if is_artifact(exec_type, options) else exec_type.source


def make_table(profile: CostProfile, options: SimulationOptions, specs: Mapping[str, AdapterSpec]) -> ArtifactTable:
    """The first placement of all adapters, by content."""
    room = _room(profile, options)
    settings = ArtifactSettings(
        extra="common" if options.migration == "dlora" else "rotating",
        swaps=options.migration == "proactive",
        seats=profile.max_num_seqs if options.max_num_seqs is None else options.max_num_seqs,
        seed=options.seed,
    )
    sizes = {spec.content_hash: spec.num_bytes for spec in specs.values()}
    return ArtifactTable(sizes, [room] * options.replicas, settings)


def replica_options(
    profile: CostProfile, options: SimulationOptions, table: ArtifactTable, index: int
) -> SimulationOptions:
    """Of one replica: slots for the adapters that were placed there, the rest of the memory for KV."""
    slots = table.slots[index]
    taken = slots * options.rank * profile.rank_bytes
    blocks = (_room(profile, options) - taken) // profile.block_bytes
    return replace(
        options,
        max_loras=slots if options.max_loras is None else options.max_loras,
        num_blocks=blocks if options.num_blocks is None else options.num_blocks,
        host_blocks=SWAP_SPACE * profile.tensor_parallel_size // profile.block_bytes,
    )


def triggers(plan_seconds: float) -> TriggerSettings:
    """A look every ``PERIOD``, however long the plan took that came of the last one."""
    pause = min(1.0, PERIOD / 2)
    return TriggerSettings(period=max(PERIOD - plan_seconds - _EARLY, pause), pause=pause, only_period=True)


def _room(profile: CostProfile, options: SimulationOptions) -> int:
    """Bytes of a replica for adapters and KV: the profile keeps some of them for adapters."""
    kept = profile.max_loras * options.rank * profile.rank_bytes
    return profile.num_blocks * profile.block_bytes + kept
