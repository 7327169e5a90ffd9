"""How many KV blocks fit."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError

logger = logging.getLogger(__name__)


def count_blocks(
    options: EngineConfig, device: torch.device, bytes_per_block: int, max_model_len: int, warm_up: Callable[[], None]
) -> int:
    """KV blocks to allocate: as asked, or as many as memory allows and requests can use.

    On a GPU the model's peak is measured first by ``warm_up``, a forward of the largest batch.

    Raises:
        ConfigError: not even one sequence of ``max_model_len`` fits.
    """
    needed = -(-max_model_len // options.block_size)
    if options.num_blocks is not None:
        count = options.num_blocks
    else:
        room = options.kv_cache_bytes if device.type == "cpu" else _free_device_bytes(options, device, warm_up)
        count = min(max(room, 0) // bytes_per_block, needed * options.max_num_seqs)
    if 0 < count < needed and options.max_model_len is None:
        logger.warning("%d KV blocks hold %d tokens: max_model_len is that", count, count * options.block_size)
    elif count < needed:
        raise ConfigError(
            f"{count} KV blocks of {options.block_size} tokens ({bytes_per_block} bytes each) cannot hold one sequence "
            f"of max_model_len={max_model_len}, which needs {needed}: lower max_model_len, or raise num_blocks, "
            f"{'kv_cache_bytes' if device.type == 'cpu' else 'gpu_memory_utilization'}"
        )
    return count


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
