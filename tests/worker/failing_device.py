"""A replica whose device fails when its process is told so by a signal. Imported by worker processes."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import DeviceLostError
from peft_dist.runner.replica import Replica, build_replica

OUT_OF_MEMORY = signal.SIGUSR1
"""The next step is out of memory; what comes after it is not."""
DEAD = signal.SIGUSR2
"""Whatever the device is asked for from now on fails, as after an illegal memory access."""


class FailingDevice:
    """A GPU is made to fail; in front of a CPU, which has no such errors, they are raised."""

    def __init__(self, replica: Replica) -> None:
        self._is_full = self._is_dead = False
        runner, pool = replica.runner, replica.store.pool
        self._device = runner.device
        self._start, self._fill = runner.start, pool.fill
        runner.start = self._run_step  # type: ignore[method-assign]
        pool.fill = self._fill_slot  # type: ignore[method-assign]
        if self._device.type != "cuda":
            replica.executor.check_device = self._check  # type: ignore[method-assign]
        signal.signal(OUT_OF_MEMORY, self._become_full)
        signal.signal(DEAD, self._die)

    def _become_full(self, signum: int, frame: FrameType | None) -> None:
        self._is_full = True

    def _die(self, signum: int, frame: FrameType | None) -> None:
        self._is_dead = True

    def _run_step(self, batch: Any) -> Any:
        step = self._start(batch)
        # Its KV was written, in part or whole, but nobody knows what it drew.
        if self._is_full:
            self._is_full = False
            run_out_of_memory(self._device)
        if self._is_dead:
            break_device(self._device)
        return step

    def _fill_slot(self, *arguments: Any, **options: Any) -> None:
        if self._is_dead:
            break_device(self._device)
        self._fill(*arguments, **options)

    def _check(self) -> None:
        if self._is_dead:
            raise DeviceLostError("the device can do nothing more for this process")


def run_out_of_memory(device: torch.device) -> None:
    """Raises torch.OutOfMemoryError."""
    if device.type == "cuda":
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1024.00 TiB.")


def break_device(device: torch.device) -> None:
    """On a GPU whatever waits for the device raises torch.AcceleratorError from now on; elsewhere this does."""
    if device.type != "cuda":
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    # An index that a kernel finds to be out of bounds.
    torch.zeros(4, device=device)[torch.tensor([1 << 20], device=device)]


def build(config: EngineConfig) -> Replica:
    replica = build_replica(config)
    FailingDevice(replica)
    return replica
