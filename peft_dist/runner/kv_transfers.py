"""Copies of KV blocks to and from other replicas, on threads beside the engine's."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from peft_dist.core.handover import KVHandle
from peft_dist.engine.executor import TransferOutcome
from peft_dist.kernels.kv_copy import KVCopier
from peft_dist.kernels.kv_pool import KVCachePool
from peft_dist.runner.background import BackgroundCalls
from peft_dist.runner.device_way import DeviceWay, Export, fetch_to_host
from peft_dist.runner.shared_memory import MemoryGoneError, SharedMemory, open_memory


class Transport(Protocol):
    """How others read what was exported here, and how theirs is read; the latter on the thread of the imports."""

    def offer(self, token: str, contents: Callable[[], torch.Tensor]) -> str | None:
        """Let others read it; the address for those on other hosts, None where there is none.

        ``contents``: uint8 ``[num_bytes]`` on the host, called on any thread, and not before somebody wants it.
        """
        ...

    def withdraw(self, token: str) -> None:
        """Nobody need read it any more."""
        ...

    def open(self, kv: KVHandle) -> torch.Tensor:
        """Contents of another replica's export. Raises MemoryGoneError."""
        ...


class SameHost:
    """Replicas of one host open each other's memory."""

    def offer(self, token: str, contents: Callable[[], torch.Tensor]) -> str | None:
        return None

    def withdraw(self, token: str) -> None:
        pass

    def open(self, kv: KVHandle) -> torch.Tensor:
        return open_memory(kv.pid, kv.descriptor, kv.token, kv.num_bytes)


# Of calls that nobody waits for.
_LET_GO = -1
# Each kind of copy has a thread. A request stands still for what is copied in the latter two: it waits neither for
# copies of others that still run, nor for an import that waits for an answer over TCP.
_AHEAD, _REST, _IN = range(3)
Memory = SharedMemory | Export


class KVTransfers:
    """Starts copies, and tells of their ends. Exports are kept until they are ended.

    Attributes:
        transport, devices: May be changed while nothing is exported.
        rank, num_ranks: Whose part of each block the pool has. What is imported must be of as many ranks.
    """

    def __init__(self, pool: KVCachePool, devices: DeviceWay | None = None) -> None:
        """``devices``: Keeps exports in device memory, from which those who cannot map it are given a copy."""
        self._pool = pool
        self._copiers = [KVCopier(pool) for _ in (_AHEAD, _REST, _IN)]
        self.devices = devices
        self.transport: Transport = SameHost()
        self.rank, self.num_ranks = 0, 1
        self._calls: BackgroundCalls[int, Memory | None] = BackgroundCalls("kv-transfer", 1, num_lanes=3)
        self._exports: dict[int, Memory | None] = {}

    def fileno(self) -> int:
        """Readable while ``take`` has something."""
        return self._calls.fileno()

    def start_export(self, key: int, blocks: Sequence[int], *, on_host: bool, ahead: bool = False) -> None:
        """As ``Executor.start_export``."""
        self._exports[key] = None
        lane = _AHEAD if ahead else _REST
        self._calls.start(key, lambda call: self._copy_out(key, lane, blocks, on_host=on_host), lane)

    def start_import(self, key: int, kv: KVHandle, blocks: Sequence[int]) -> None:
        """As ``Executor.start_import``."""
        self._calls.start(key, lambda call: self._copy_in(kv, blocks), _IN)

    def end_export(self, key: int) -> None:
        """As ``Executor.end_export``."""
        held = [self._exports.pop(key, None)]
        if held[0] is None:
            return
        self.transport.withdraw(held[0].token)
        if isinstance(held[0], Export) and self.devices is not None:
            self.devices.withdraw(held[0])
            # Freeing it may wait for the device.
            self._calls.start(_LET_GO, lambda call: held.clear(), _AHEAD)

    def take(self) -> list[TransferOutcome]:
        """As ``Executor.take_transfers``."""
        outcomes = []
        for ended in self._calls.take():
            if ended.key == _LET_GO:
                continue
            handle = None
            if ended.result is not None and ended.key in self._exports:
                self._exports[ended.key] = ended.result
                handle = self._describe(ended.result, ended.seconds)
            error = None if ended.error is None else f"{type(ended.error).__name__}: {ended.error}"
            outcomes.append(TransferOutcome(ended.key, handle, error, ended.seconds))
        return outcomes

    def close(self) -> None:
        """End the thread, and let all memory go."""
        self._calls.close()
        self._exports.clear()
        if self.devices is not None:
            self.devices.close()

    def _copy_out(self, key: int, lane: int, blocks: Sequence[int], *, on_host: bool) -> Memory | None:
        if key not in self._exports:
            # It was ended while others were copied: nobody has room for it any more.
            return None
        copier, num_bytes = self._copiers[lane], len(blocks) * self._pool.bytes_per_block
        if self.devices is not None and not on_host:
            export = self.devices.allocate(num_bytes)
            if export is not None:
                copier.read_into(blocks, export.contents)
                return export
        memory = SharedMemory(num_bytes)
        copier.read(blocks, memory.contents, on_host=on_host)
        return memory

    def _copy_in(self, kv: KVHandle, blocks: Sequence[int]) -> None:
        copier, parts = self._copiers[_IN], [kv, *kv.others]
        if len(parts) != self.num_ranks:
            raise MemoryGoneError(f"KV of {len(parts)} ranks does not fit {self.num_ranks}")
        kv, num_bytes = parts[self.rank], len(blocks) * self._pool.bytes_per_block
        if (kv.layout, kv.num_bytes) != (self._pool.layout, num_bytes):
            raise MemoryGoneError(f"{kv.num_bytes} bytes of {kv.layout} do not fit {num_bytes} of {self._pool.layout}")
        if kv.server is None:
            copier.write(blocks, self.transport.open(kv))
            return
        try:
            memory = self.devices.map(kv) if self.devices is not None else None
            if memory is not None:
                copier.write_from(blocks, memory)
                return
            contents = fetch_to_host(kv)
        except MemoryGoneError:
            if kv.address is None:
                raise
            # Files are handed over within a host only.
            contents = self.transport.open(kv)
        copier.write(blocks, contents)

    def _describe(self, memory: Memory, seconds: float) -> KVHandle:
        server = None
        if isinstance(memory, SharedMemory):
            num_bytes, descriptor = len(memory.contents), memory.descriptor
            address = self.transport.offer(memory.token, lambda: memory.contents)
        else:
            devices = self.devices
            assert devices is not None, "it was made there"
            num_bytes, descriptor, server = memory.contents.num_bytes, -1, devices.offer(memory)
            address = self.transport.offer(memory.token, lambda: devices.host_copy(memory))
        return KVHandle(
            layout=self._pool.layout,
            num_blocks=num_bytes // self._pool.bytes_per_block,
            num_bytes=num_bytes,
            token=memory.token,
            pid=os.getpid(),
            descriptor=descriptor,
            address=address,
            seconds=seconds,
            server=server,
        )
