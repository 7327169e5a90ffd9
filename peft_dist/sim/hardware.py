"""Replicas of a profile, as an execution type has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from peft_dist.core.config import EngineConfig
from peft_dist.core.cost_model import CostModel, CostPrior
from peft_dist.placement.placer import MigrationKind
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.sim.replica import SimHardware

# More than any prompt takes to be computed again.
_NEVER = 1e6


@dataclass(frozen=True, slots=True)
class ExecType:
    """One way to run adapters.

    Attributes:
        hardware: Makes the replica with a number, counted from 0.
        migration: The only kind that it knows; None: what is asked for.
        is_apart: Whether each adapter has one replica, for good (``apart.py``).
        spreads: Whether adapters then go to the replicas in turn, and not in a row as the artifact's.
        is_artifact: Whether its cluster goes by the artifact's rules whatever is asked for (``artifact.py``).
        moves: Whether requests may move.
        decides: Options that it decides itself, by name, and what they then are.
        source: Where its costs and rules come from, for results.
    """

    hardware: Callable[[CostProfile, SimulationOptions, int], SimHardware]
    migration: MigrationKind | None = None
    is_apart: bool = False
    spreads: bool = True
    is_artifact: bool = False
    moves: bool = True
    decides: Mapping[str, Any] = field(default_factory=dict)
    source: str = "the profile's costs, the engine and the policies that serve"


def engine_config(profile: CostProfile, options: SimulationOptions, **more: Any) -> EngineConfig:
    """The engine's options; ``more`` overrides both. Raises ConfigError for what contradicts itself."""
    more = {**_asked(options), **more}
    settings: dict[str, Any] = {
        "policy": options.policy,
        "exec_type": options.exec_type,
        "merge": options.merge,
        "merged_minority": options.merged_minority,
        "policy_profile": options.policy_profile,
        "max_model_len": profile.max_model_len,
        "block_size": profile.block_size,
        "max_num_seqs": _or(options.max_num_seqs, profile.max_num_seqs),
        "max_num_batched_tokens": _or(options.max_num_batched_tokens, profile.max_num_batched_tokens),
        "max_loras": _or(options.max_loras, profile.max_loras),
        "depth": _or(options.depth, profile.depth),
        # No two prompts of a workload begin alike.
        "enable_prefix_caching": False,
    }
    return EngineConfig("simulated", **{**settings, **more})


def _asked(options: SimulationOptions) -> dict[str, Any]:
    """What is left to the engine if it is not given."""
    more: dict[str, Any] = {}
    if options.max_adapter_wait is not None:
        more["max_adapter_wait"] = options.max_adapter_wait
    if options.host_blocks:
        more |= {"num_host_blocks": options.host_blocks, "preemption": "swap"}
    return more


def make_hardware(
    profile: CostProfile, options: SimulationOptions, config: EngineConfig, costs: CostPrior | None = None, **more: Any
) -> SimHardware:
    """A replica whose work takes ``costs`` (None: the profile's), which its engine knows. ``more``: fields of it."""
    costs = costs or profile.costs
    if not options.moves_kv:
        costs = replace(costs, transfer=(_NEVER, 0.0))
    fields: dict[str, Any] = {
        "num_blocks": _or(options.num_blocks, profile.num_blocks),
        "block_bytes": profile.block_bytes,
        "num_held": 0 if options.merge == "host" else profile.num_held,
        "host_seconds": profile.host_seconds,
        "can_merge": config.merge != "off",
        "prompt_sizes": profile.prompt_sizes,
        "decode_sizes": profile.decode_sizes,
        "context_token": profile.context_token,
        "context": profile.context,
        "loads_at_once": profile.loads_at_once,
    }
    return SimHardware(
        config,
        CostModel(costs, fixed=True),
        lambda: CostModel(costs, fixed=not options.learns),
        **{**fields, **more},
    )


def dlora(profile: CostProfile, options: SimulationOptions, index: int) -> SimHardware:
    """What serves: merged and unmerged execution by policy."""
    return make_hardware(profile, options, engine_config(profile, options))


def _or(asked: int | None, usual: int) -> int:
    return usual if asked is None else asked
