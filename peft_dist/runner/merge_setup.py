"""What merges adapters into a model, chosen from the configuration, with its memory taken at the start."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.runner.adapter_modules import ModuleShape
from peft_dist.runner.memory import Room, adapter_host_bytes, free_memory
from peft_dist.runner.merge_state import MergeState
from peft_dist.runner.merged_ratio import row_rms
from peft_dist.runner.swapped_models import SwappedModels

logger = logging.getLogger(__name__)

Merging = MergeState | SwappedModels


def make_merging(
    config: EngineConfig, model: PreTrainedModel, modules: Mapping[str, ModuleShape], room: Room
) -> Merging | None:
    """What merges adapters, with the second copies made that adapters of linear layers need; None where nothing does.

    Raises:
        ConfigError: there is too little memory for them.
    """
    if config.merge == "off" or config.policy == "fcfs":
        return None
    paths = _usual_targets(model, modules)
    merging: Merging
    if config.exec_type == "vllm":
        # Copies of whole models are no copies of adapters: adapter_host_memory would hold none of them.
        host_budget = free_memory() // 2 or adapter_host_bytes(config, model.device)
        merging = SwappedModels(model, paths, config.resident_models, host_budget, room)
    else:
        merging = MergeState(model, config.merge, room, paths)
    if lack := _lack(merging, model, room):
        if config.merge != "auto" or config.exec_type != "dlora" or config.policy == "merge":
            raise ConfigError(lack)
        logger.warning("adapters run unmerged: %s", lack)
        return None
    logger.info(
        "adapters are merged by way of %s: making second copies of %.0f MiB %s",
        merging.way,
        merging.num_bytes / 2**20,
        "on the device" if merging.on_device else "in host memory",
    )
    began = time.perf_counter()
    merging.allocate()
    logger.info("made in %.1f s", time.perf_counter() - began)
    if reasons := Counter(reason for path, reason in merging.cannot.items() if path in modules):
        some = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common())
        logger.info("%d of %d modules cannot be merged into (%s)", reasons.total(), len(modules), some)
    return merging


def later_device_bytes(config: EngineConfig, merging: Merging | None, modules: Mapping[str, ModuleShape]) -> int:
    """Device bytes to leave for second copies of embeddings and the output layer, which few adapters target.

    They are made when such an adapter is registered. Where adapters can run unmerged, nothing is left for them: it
    would be taken from everybody's KV blocks.
    """
    if merging is None or not merging.on_device or config.exec_type == "dlora":
        return 0
    return merging.more_bytes(modules)


def as_in_the_base(modules: Mapping[str, ModuleShape], merging: Merging | None) -> Mapping[str, ModuleShape]:
    """The modules, whose weights read as the base's whatever is merged in place at the moment; and their norms.

    To be called while nothing is merged or runs: all weights are read once.
    """
    if merging is None:
        return modules
    return {
        path: module if path in merging.cannot else _mergeable(module, partial(merging.base_weight, path))
        for path, module in modules.items()
    }


def _mergeable(module: ModuleShape, read: Callable[[], torch.Tensor]) -> ModuleShape:
    num_outputs = module.in_features if module.kind == "embedding" else module.out_features
    return replace(module, weight=read, row_rms=row_rms(read(), num_outputs))


def _usual_targets(model: PreTrainedModel, modules: Mapping[str, ModuleShape]) -> list[str]:
    """What PEFT's "all-linear" means: everything but embeddings and the output layer."""
    output = model.get_output_embeddings()
    return [
        path
        for path, module in modules.items()
        if module.kind != "embedding" and model.get_submodule(path) is not output
    ]


def _lack(merging: Merging, model: PreTrainedModel, room: Room) -> str | None:
    left, needed = room(merging.on_device), merging.num_bytes
    if left is None or needed <= max(left, 0):
        return None
    on_gpu = merging.on_device and model.device.type == "cuda"
    where = "this replica's share of the device (raise gpu_memory_utilization)" if on_gpu else "host memory"
    return (
        f"second copies of the weights, for merging by way of {merging.way}, take {needed} bytes, but {max(left, 0)} "
        f"are left of {where}: free memory there, or {merging.remedy}"
    )
