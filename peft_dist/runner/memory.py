"""How many KV blocks fit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError

logger = logging.getLogger(__name__)


def count_blocks(
    options: EngineConfig,
    device: torch.device,
    bytes_per_block: int,
    max_model_len: int,
    adapter_bytes: int,
    warm_up: Callable[[], None],
) -> int:
    """KV blocks to allocate: as asked, or as many as memory allows and requests can use.

    On a GPU the model's peak is measured first by ``warm_up``, a forward of the largest batch, and ``adapter_bytes``
    are left for pages of adapters that are allocated later.

    Raises:
        ConfigError: not even one sequence of ``max_model_len`` fits.
    """
    needed = -(-max_model_len // options.block_size)
    if options.num_blocks is not None:
        count = options.num_blocks
    else:
        if device.type == "cpu":
            room = options.kv_cache_bytes
        else:
            room = _free_device_bytes(options, device, warm_up) - adapter_bytes
        count = min(max(room, 0) // bytes_per_block, needed * options.max_num_seqs)
    if 0 < count < needed and options.max_model_len is None:
        logger.warning("%d KV blocks hold %d tokens: max_model_len is that", count, count * options.block_size)
    elif count < needed:
        raise ConfigError(
            f"{count} KV blocks of {options.block_size} tokens ({bytes_per_block} bytes each) cannot hold one sequence "
            f"of max_model_len={max_model_len}, which needs {needed}: lower max_model_len, or raise num_blocks, "
            f"{'kv_cache_bytes' if device.type == 'cpu' else 'gpu_memory_utilization, or lower adapter_device_memory'}"
        )
    return count


def merge_budget(device: torch.device) -> int | None:
    """Bytes that a second copy of the weights may take; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    free = free_memory()
    return free // 2 if free else None


def free_memory() -> int:
    """Bytes of host memory that can still be allocated; 0 where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (FileNotFoundError, KeyError):
        return 0


def _free_device_bytes(options: EngineConfig, device: torch.device, warm_up: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    warm_up()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    room = int(total * options.gpu_memory_utilization) - peak - others
    logger.info("device memory: %.2f GiB in all, %.2f GiB at the model's peak", total / 2**30, peak / 2**30)
    return room
