"""The paper's baselines, as its artifact runs them and as is fair, and what the paper lacks.

The artifact's are held back by its scheduler: of the queue they batch only the requests at its head that are for one
adapter (``PolicySettings.strict_prefix``). The fair ones batch all requests of an adapter, and change it only
when the oldest request is for another one. Everything else is the engine, the policies and the orchestrator that serve;
what differs is what work costs, and that is written into results (``ExecType.source``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from peft_dist.core.errors import ConfigError
from peft_dist.sim.hardware import ExecType, engine_config, make_hardware
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.sim.replica import SimHardware

BUS = 32 * 2**30
"""Bytes a second between host and device: the constant of the artifact's manager. Its vLLM moves memory that is not
pinned, which is slower."""
RESIDENT = {True: 4, False: 2}
"""Whole models on a device in the artifact's vLLM: of 7b, of anything larger."""
GROUPED_RATIO = 1.245
"""A step of 32 rows with 32 adapters over one without: 8.156 and 6.551 ms, Llama-3.1-8B's shape on one H100 with our
kernels (docs/results/gpu_peft.json)."""
_ANY_NUMBER = 1 << 16


def whole_models(profile: CostProfile, options: SimulationOptions, index: int, *, artifact: bool) -> SimHardware:
    """vLLM: each adapter is a model of its own; a few are on the device, and others are copied in when they run.

    The first ones of ``options.adapters`` are there from the start, as in the artifact.

    Raises ConfigError for a profile that does not tell its weights' bytes, or has no room for the models.
    """
    if not profile.weight_bytes:
        raise ConfigError(f"profile {profile.name!r} does not tell weight_bytes: whole models cannot be simulated")
    resident = RESIDENT["7b" in profile.model.lower()]
    # The artifact copies the model that leaves to the host; whoever keeps a copy there need not.
    seconds = (2 if artifact else 1) * profile.weight_bytes / profile.tensor_parallel_size / BUS
    costs = replace(profile.costs, lora_step=0.0, load=(0.0, 0.0), merge=(seconds, 0.0), unmerge=(0.0, 0.0))
    # What the profile keeps for adapters is not needed, what further models take is.
    free = profile.num_blocks * profile.block_bytes + profile.max_loras * options.rank * profile.rank_bytes
    num_blocks = (free - (resident - 1) * profile.weight_bytes) // profile.block_bytes
    if num_blocks * profile.block_size < profile.max_model_len:
        raise ConfigError(f"{resident} whole models of {profile.model} leave no room for KV: use a larger device")
    rules = _rules(artifact) | {"exec_type": "vllm", "policy": None, "merge": "auto", "max_loras": _ANY_NUMBER}
    config = engine_config(profile, options, **rules, resident_models=resident)
    there = options.adapters[:resident]
    held = tuple(profile.adapter(name, options.ranks.get(name, options.rank)).content_hash for name in there)
    return make_hardware(profile, options, config, costs, num_held=resident, held=held, num_blocks=num_blocks)


def one_at_a_time(profile: CostProfile, options: SimulationOptions, index: int, *, artifact: bool) -> SimHardware:
    """PEFT: the adapter of the batch is merged before its step. In the artifact that is done and undone in every step;
    else when the adapter changes, where the one before it is taken out first."""
    merge, unmerge = (profile.costs.merge, profile.costs.unmerge)
    both = (merge[0] + unmerge[0], merge[1] + unmerge[1])
    costs = replace(profile.costs, merge=both, unmerge=unmerge)
    if artifact:
        if merge[1] or unmerge[1]:
            both = (both[0] + both[1] * options.rank * profile.modules, 0.0)
        costs = replace(profile.costs, merged_step=profile.costs.merged_step + both[0], merge=(0.0, 0.0))
        costs = replace(costs, unmerge=(0.0, 0.0))
    config = engine_config(profile, options, **_rules(artifact), exec_type="peft", policy=None, merge="host")
    return make_hardware(profile, options, config, costs, num_held=0)


def grouped(profile: CostProfile, options: SimulationOptions, index: int) -> SimHardware:
    """Today's kernels: a step with any adapters takes ``GROUPED_RATIO`` times one without, which is all that is charged
    for LoRA. With the policy "fcfs" that is what servers like S-LoRA do; others merge on top of it."""
    costs = profile.costs
    step = costs.step + profile.max_num_seqs * costs.decode_sequence
    costs = replace(
        costs, lora_step=step * (GROUPED_RATIO - 1), lora_token=0.0, adapter=0.0, rank_row=0.0, rank_row_token=0.0
    )
    return make_hardware(profile, options, engine_config(profile, options, exec_type="dlora"), costs)


def _rules(artifact: bool) -> dict[str, object]:
    """Of batching. A bound on being overtaken would make the fair ones change adapters for it, at their high price."""
    if artifact:
        return {"policy_profile": "artifact", "max_adapter_wait": math.inf}
    return {"policy_profile": "default", "max_adapter_wait": math.inf}


def _decided(artifact: bool, **more: Any) -> Mapping[str, Any]:
    """Options of a baseline that are none: it is what it is by them."""
    return {**_rules(artifact), "policy": "merge", "merged_minority": False, **more}


_VLLM: Mapping[str, Any] = {"merge": "auto", "migration": "rr", "max_loras": None}
_SWAP = (
    "4 models of 7b or 2 of others are on a device, the first ones from the start; a model is copied in at 32 GiB/s a "
    "device (the artifact's PCIe constant)"
)
_HEAD = "batches are the same-adapter head of the queue, 16 seats"
BASELINES: Mapping[str, ExecType] = {
    "vllm-artifact": ExecType(
        partial(whole_models, artifact=True), "rr", is_apart=True, spreads=False,
        decides=_decided(True, **_VLLM), source=
        f"the artifact's vLLM: {_HEAD}; models are placed in a row, the first ones on the first replica; {_SWAP}, and "
        "the one that leaves is copied out; steps cost merged ones",
    ),
    "vllm": ExecType(
        partial(whole_models, artifact=False), "rr", is_apart=True, decides=_decided(False, **_VLLM), source=
        f"vLLM, fair: batches are all requests of the oldest one's adapter; models go to replicas in turn; {_SWAP}; "
        "steps cost merged ones",
    ),
    "peft-artifact": ExecType(
        partial(one_at_a_time, artifact=True), is_artifact=True, moves=False,
        decides=_decided(True, merge="host"), source=
        f"the artifact's PEFT: {_HEAD}; every step merges and unmerges, a switch each (its copies and checks of the "
        "weights are not charged)",
    ),
    "peft": ExecType(
        partial(one_at_a_time, artifact=False), decides=_decided(False, merge="host"), source=
        "PEFT, fair: batches are all requests of the oldest one's adapter; a change unmerges and merges, a switch each",
    ),
    "grouped": ExecType(
        grouped, source=
        f"grouped LoRA kernels: a step with adapters takes {GROUPED_RATIO} times one without (ours on an H100, 32 rows "
        "of 32 adapters: docs/results/gpu_peft.json)",
    ),
}  # fmt: skip
