"""How many rank rows of adapters fit on the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.kernels.lora_pool import LoRAPool, default_page_rows
from peft_dist.kernels.lora_room import most_per_rank
from peft_dist.runner.adapter_modules import ModuleShape

# Without a budget there is room for max_loras adapters of this rank, and for one of the largest.
_USUAL_RANK = 16
_USUAL_RANK_CPU = 64
_LARGEST_RANK = 256


def row_bytes(modules: Mapping[str, ModuleShape], dtype: torch.dtype) -> int:
    """Bytes of one rank row of A and B in every module that can be adapted."""
    return sum(module.in_features + module.out_features for module in modules.values()) * dtype.itemsize


def count_rows(
    config: EngineConfig, modules: Mapping[str, ModuleShape], device: torch.device, dtype: torch.dtype
) -> int:
    """Rank rows that each module has for adapters, in whole pages.

    Raises:
        ConfigError: the budget is not enough for a single page of each.
    """
    page_rows = default_page_rows(device)
    if config.adapter_device_memory is None:
        usual = _USUAL_RANK_CPU if device.type == "cpu" else _USUAL_RANK
        return -(-max(config.max_loras * usual, _LARGEST_RANK) // page_rows) * page_rows
    each = row_bytes(modules, dtype)
    rows = config.adapter_device_memory // each // page_rows * page_rows
    if not rows:
        raise ConfigError(
            f"adapter_device_memory={config.adapter_device_memory} holds no page of {page_rows} rank rows, which take "
            f"{page_rows * each} bytes in this model: give more (--adapter-device-memory)"
        )
    return rows


def expect_workspace(config: EngineConfig, modules: Mapping[str, ModuleShape], pool: LoRAPool) -> int:
    """Size the memory of rank intermediates for the largest step, when a step first needs it; the bytes it may take.

    Adapters of more than 256 ranks take more than that. Where all of them are merged, nothing is needed.
    """
    if config.exec_type != "dlora":
        return 0
    device = pool.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    rank = min(pool.num_rows or _LARGEST_RANK, _LARGEST_RANK)
    inputs = {module.in_features for module in modules.values() if module.kind != "embedding"}
    rows, slots = config.max_num_batched_tokens, pool.num_slots or config.max_num_seqs
    pool.workspace.per_rank = most_per_rank(inputs, rows, slots, rank, name)
    return pool.workspace.bytes_with(rank)
