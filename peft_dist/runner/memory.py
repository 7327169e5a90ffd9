"""How many KV blocks fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.kernels.lora_pool import LoRAPool

logger = logging.getLogger(__name__)

_LEAST_FOR_ADAPTERS, _MOST_FOR_ADAPTERS = 2 << 30, 16 << 30

Room = Callable[[bool], int | None]
"""Bytes that can still be taken now, on the model's device (True) or of the host; None where nobody knows."""


def no_limit(on_device: bool) -> None:
    """Room where nobody counts."""


def reason_against(needed: int, room: Room, what: str, remedy: str, *, on_device: bool) -> str | None:
    """Why ``what`` (plural) cannot have so many bytes more, with what may help; None where there is room."""
    left = room(on_device) if needed else None
    if left is None or needed <= left:
        return None
    return (
        f"{what} would need {needed} bytes more, {max(left, 0)} are left: {remedy}, or ask for fewer KV blocks "
        "(--num-blocks)"
    )


class MemoryLeft:
    """What is left of a replica's share of its device, and of the host's memory. A ``Room``.

    Attributes:
        promised: Bytes on the device that will be taken by something else.
    """

    def __init__(self, options: EngineConfig, device: torch.device, pool: LoRAPool, adapter_bytes: int) -> None:
        """``pool`` and its workspace take up to ``adapter_bytes`` of the device, of which a part is allocated."""
        self.promised = 0
        self._utilization = options.gpu_memory_utilization
        self._device = device
        self._pool = pool
        self._adapter_bytes = adapter_bytes

    def __call__(self, on_device: bool) -> int | None:
        if not on_device or self._device.type == "cpu":
            return free_memory() or None
        free, total = torch.cuda.mem_get_info(self._device)
        to_come = self._adapter_bytes - self._pool.num_bytes - self._pool.workspace.num_bytes
        used = total - free + to_come + self.promised
        return int(total * self._utilization) - used


def count_blocks(
    options: EngineConfig,
    device: torch.device,
    bytes_per_block: int,
    max_model_len: int,
    reserved_bytes: int,
    warm_up: Callable[[], None],
    remedy: str | None = None,
    graph_bytes: Callable[[int], int] | None = None,
) -> int:
    """KV blocks to allocate: as asked, or as many as memory allows and requests can use.

    On a GPU the model's peak is measured first by ``warm_up``, a forward of the largest batch. What is allocated by
    then (the shadow of merged weights) is in it; ``reserved_bytes`` are left for what comes later (pages of adapters,
    and what their kernels have in work: no adapter is there when the batch runs).

    Args:
        remedy: What else would leave more memory to KV blocks.
        graph_bytes: What captured steps will take, from the bytes that the largest batch takes while it runs.

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
            room = _free_device_bytes(options, device, warm_up, graph_bytes) - reserved_bytes
        count = min(max(room, 0) // bytes_per_block, needed * options.max_num_seqs)
    if 0 < count < needed and options.max_model_len is None:
        logger.warning("%d KV blocks hold %d tokens: max_model_len is that", count, count * options.block_size)
    elif count < needed:
        on_device = "gpu_memory_utilization, or lower adapter_device_memory" + (f", or {remedy}" if remedy else "")
        raise ConfigError(
            f"{count} KV blocks of {options.block_size} tokens ({bytes_per_block} bytes each) cannot hold one sequence "
            f"of max_model_len={max_model_len}, which needs {needed}: lower max_model_len, or raise num_blocks, "
            f"{'kv_cache_bytes' if device.type == 'cpu' else on_device}"
        )
    return count


@contextmanager
def noting_memory(device: torch.device, what: str) -> Iterator[None]:
    """Log what a GPU's memory is less by afterwards."""
    if device.type != "cuda":
        yield
        return
    before, _ = torch.cuda.mem_get_info(device)
    yield
    after, _ = torch.cuda.mem_get_info(device)
    logger.info("device memory: %s took %.2f GiB, %.2f are free", what, (before - after) / 2**30, after / 2**30)


def free_memory() -> int:
    """Bytes of host memory that can still be allocated; 0 where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (FileNotFoundError, KeyError):
        return 0


def adapter_host_bytes(config: EngineConfig, device: torch.device) -> int:
    """Of host memory for copies of adapters: as asked for, else what a host can spare for each of its GPUs."""
    if config.adapter_host_memory is not None:
        return config.adapter_host_memory
    if device.type == "cpu":
        return _LEAST_FOR_ADAPTERS
    return max(_LEAST_FOR_ADAPTERS, min(free_memory() // 16, _MOST_FOR_ADAPTERS))


def _free_device_bytes(
    options: EngineConfig,
    device: torch.device,
    warm_up: Callable[[], None],
    graph_bytes: Callable[[int], int] | None,
) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    warm_up()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    room = int(total * options.gpu_memory_utilization) - peak - others
    if graph_bytes is not None:
        room -= graph_bytes(peak - before)
    logger.info("device memory: %.2f GiB in all, %.2f GiB at the model's peak", total / 2**30, peak / 2**30)
    return room
