"""KV that goes from one GPU to another of its host without a way through host memory."""

from __future__ import annotations

import logging
import os
import secrets
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

import torch

from peft_dist.core.handover import KVHandle
from peft_dist.kernels.kv_copy import FlatMemory
from peft_dist.runner.descriptor_server import DescriptorServer, fetch_descriptor
from peft_dist.runner.device_memory import DeviceMemory, find_obstacle
from peft_dist.runner.shared_memory import MemoryGoneError, SharedMemory, map_memory

logger = logging.getLogger(__name__)

_DEVICE, _HOST = b"d", b"h"
# Of all exports of one device at once; what is more goes through the host.
_MOST_BYTES = 1 << 30
# The driver gives out no less at once.
GRAIN_BYTES = 2 << 20
_PIECE_BYTES = 16 << 20


class FileMemory(FlatMemory, Protocol):
    """Flat memory with an open file by which other processes can map it."""

    num_bytes: int
    descriptor: int


class Export:
    """Device memory that others may map.

    Attributes:
        contents: To be filled before it is offered.
        token: Tells it from all others.
    """

    def __init__(self, memory: FileMemory) -> None:
        self.contents = memory
        self.token = secrets.token_hex(16)
        self._copy: SharedMemory | None = None
        # Whoever asks may do so on any thread.
        self._lock = threading.Lock()

    def host_copy(self, device: torch.device) -> SharedMemory:
        """The contents for those who cannot map the device's memory; made when it is first asked for."""
        with self._lock:
            if self._copy is None:
                self._copy = _copy_to_host(self.contents, device)
            return self._copy

    def descriptor(self, kind: bytes, device: torch.device) -> int:
        """For one who can map the device's memory, or who cannot: of a copy in host memory."""
        if kind == _DEVICE:
            return self.contents.descriptor
        return self.host_copy(device).descriptor


class DeviceWay:
    """Makes, offers and opens exports on a device. ``allocate`` and ``map`` are for the threads of the copies.

    An export lies in memory of its own, filled from the pool: it lives until the last process that has it open lets go,
    so that a reader outlives its writer. It leaves half of the device's free memory to others.
    """

    def __init__(
        self,
        device: torch.device,
        make: Callable[[int], FileMemory],
        map_file: Callable[[int, int], FlatMemory],
        free_bytes: Callable[[], int],
    ) -> None:
        """
        Args:
            make: Memory of so many bytes. Raises MemoryGoneError.
            map_file: Memory of another process, by descriptor and bytes. Raises MemoryGoneError.
            free_bytes: Of the device.

        Raises:
            OSError: files cannot be handed to others here.
        """
        self._device, self._make, self._map_file, self._free_bytes = device, make, map_file, free_bytes
        self._server = DescriptorServer()
        self._lock = threading.Lock()
        self._used = 0
        self._can_map = True

    def allocate(self, num_bytes: int) -> Export | None:
        """None where there is no room to spare."""
        taken = -(-num_bytes // GRAIN_BYTES) * GRAIN_BYTES
        # Made under the lock: of two that ask at once each would see the same free memory.
        with self._lock:
            if taken > min(_MOST_BYTES - self._used, self._free_bytes() // 2):
                return None
            try:
                export = Export(self._make(num_bytes))
            except MemoryGoneError:
                return None
            self._used += taken
        weakref.finalize(export, self._count, -taken).atexit = False
        return export

    def offer(self, export: Export) -> str:
        """Let others have it; where."""
        self._server.offer(export.token, lambda kind: export.descriptor(kind, self._device))
        return self._server.address

    def host_copy(self, export: Export) -> torch.Tensor:
        """Its contents on the host: uint8 ``[num_bytes]``."""
        return export.host_copy(self._device).contents

    def withdraw(self, export: Export) -> None:
        """End what ``offer`` began; who has it open already may read on."""
        self._server.withdraw(export.token)

    def map(self, kv: KVHandle) -> FlatMemory | None:
        """Another replica's export, mapped; None where this device cannot reach that one. Raises MemoryGoneError."""
        if not self._can_map:
            return None
        assert kv.server is not None, "it lies on the host"
        descriptor = fetch_descriptor(kv.server, kv.token, _DEVICE)
        try:
            return self._map_file(descriptor, kv.num_bytes)
        except MemoryGoneError as error:
            # Which is so for good, or a matter of memory: the host's is as good.
            logger.warning("KV of other GPUs comes through host memory from now on: %s", error)
            self._can_map = False
            return None
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Offer nothing any more."""
        self._server.close()

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self._used += num_bytes


def fetch_to_host(kv: KVHandle) -> torch.Tensor:
    """Another replica's export on a device, copied to the host there: uint8 ``[kv.num_bytes]``.

    Raises:
        MemoryGoneError: that process has ended or has let it go, or is not on this host.
    """
    assert kv.server is not None, "it lies on the host"
    descriptor = fetch_descriptor(kv.server, kv.token, _HOST)
    try:
        return map_memory(descriptor, kv.num_bytes)[1]
    finally:
        os.close(descriptor)


def choose_device_way(device: torch.device) -> DeviceWay | None:
    """For the exports of a GPU; None, with the reason logged, where they are to go through host memory."""
    if device.type != "cuda":
        return None
    obstacle, way = find_obstacle(device), None
    if obstacle is None:
        try:
            way = DeviceWay(
                device,
                lambda num_bytes: DeviceMemory(num_bytes, device),
                lambda descriptor, num_bytes: DeviceMemory(num_bytes, device, descriptor),
                lambda: torch.cuda.mem_get_info(device)[0],
            )
        except OSError as error:
            obstacle = str(error)
    if way is None:
        logger.info("KV for other replicas of this host goes through host memory: %s", obstacle)
    else:
        logger.info("KV for other replicas of this host stays in device memory, which they map")
    return way


def _copy_to_host(memory: FileMemory, device: torch.device) -> SharedMemory:
    copy = SharedMemory(memory.num_bytes)
    piece = torch.empty(min(_PIECE_BYTES, memory.num_bytes), dtype=torch.uint8, device=device)
    # Whatever else the device does goes on.
    with torch.cuda.stream(torch.cuda.Stream(device) if device.type == "cuda" else None):
        for first in range(0, memory.num_bytes, _PIECE_BYTES):
            part = piece[: memory.num_bytes - first]
            memory.get(first, part)
            copy.contents[first : first + len(part)].copy_(part)
    return copy
