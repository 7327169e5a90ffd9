"""A load put to a simulated cluster, with the paper's profile."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from experiments.loads import LoadSpec
from experiments.measured import Measured, Work, measure
from experiments.systems import SYSTEMS
from peft_dist.sim.exec_types import effective, find
from peft_dist.sim.experiment import simulate
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.workload.arrivals import Workload

PROFILES = {"7b": "paper-7b", "13b": "paper-13b", "70b": "paper-70b-tp4"}


def simulated(name: str, model: str, replicas: int, workload: Workload, load: LoadSpec) -> Measured:
    """Of a system, a model's profile, so many replicas, and all adapters of the load that made the workload."""
    profile = CostProfile.load(PROFILES[model])
    profile = replace(profile, max_model_len=max(profile.max_model_len, load.max_total))
    names = tuple(f"adapter{index}" for index in range(load.adapters))
    options = replace(options_of(name), replicas=replicas, adapters=names, seed=load.seed)
    result = simulate(workload.arrivals, profile, options)
    moves = result.migration.moves
    work = Work(
        switch_seconds=result.switch_seconds,
        plan_seconds=result.migration.plan_seconds,
        queueing=tuple(replica.queueing_share or 0.0 for replica in result.replicas),
        switches=sum(replica.switches for replica in result.replicas),
        loads=sum(replica.loads for replica in result.replicas),
        moved_with_kv=moves.get("kv", 0),
        recomputed=moves.get("recompute", 0),
    )
    return measure(result.records, work)


def options_of(name: str) -> SimulationOptions:
    """How a system runs. The paper's moves compute KV again; modern ones bring it along where that is cheaper."""
    system = SYSTEMS[name]
    return SimulationOptions(
        exec_type=system.exec_type,
        policy=system.policy,
        migration=system.migration,
        policy_profile="artifact" if system.form == "artifact" else "default",
        merged_minority=system.name == "corrected",
        moves_kv=system.form == "modern",
        token_times=False,
    )


def profile_of(model: str) -> dict[str, Any]:
    """What everything takes for a model, and where that comes from."""
    return asdict(CostProfile.load(PROFILES[model]))


def rules_of(name: str, seed: int) -> dict[str, Any]:
    """The options of a system, and the rules and costs of its execution type."""
    options = effective(replace(options_of(name), seed=seed))
    return {"options": options.told(), "exec_type": find(options.exec_type).source}
