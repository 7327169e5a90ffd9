"""Copies of KV blocks to and from other replicas, on a thread beside the engine's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import torch

from peft_dist.core.handover import KVHandle
from peft_dist.engine.executor import TransferOutcome
from peft_dist.kernels.kv_copy import KVCopier
from peft_dist.kernels.kv_pool import KVCachePool
from peft_dist.runner.background import BackgroundCalls
from peft_dist.runner.shared_memory import MemoryGoneError, SharedMemory, open_memory


class Transport(Protocol):
    """How others read what was exported here, and how theirs is read; the latter on the thread of the copies."""

    def offer(self, memory: SharedMemory) -> str | None:
        """Let others read it; the address for those on other hosts, None where there is none."""
        ...

    def withdraw(self, memory: SharedMemory) -> None:
        """Nobody need read it any more."""
        ...

    def open(self, kv: KVHandle) -> torch.Tensor:
        """Contents of another replica's export. Raises MemoryGoneError."""
        ...


class SameHost:
    """Replicas of one host open each other's memory."""

    def offer(self, memory: SharedMemory) -> str | None:
        return None

    def withdraw(self, memory: SharedMemory) -> None:
        pass

    def open(self, kv: KVHandle) -> torch.Tensor:
        return open_memory(kv.pid, kv.descriptor, kv.token, kv.num_bytes)


class KVTransfers:
    """Starts copies, and tells of their ends. Exports are kept until they are ended.

    Attributes:
        transport: May be changed while nothing is exported.
        refusal: Why nothing can be copied; every copy fails with it.
    """

    def __init__(self, pool: KVCachePool) -> None:
        self._pool = pool
        self._copier = KVCopier(pool)
        self.transport: Transport = SameHost()
        self.refusal: str | None = None
        self._calls: BackgroundCalls[int, SharedMemory | None] = BackgroundCalls("kv-transfer", 1)
        self._exports: dict[int, SharedMemory | None] = {}

    def fileno(self) -> int:
        """Readable while ``take`` has something."""
        return self._calls.fileno()

    def start_export(self, key: int, blocks: Sequence[int], *, on_host: bool) -> None:
        """As ``Executor.start_export``."""
        self._exports[key] = None
        self._calls.start(key, lambda call: self._copy_out(blocks, on_host=on_host))

    def start_import(self, key: int, kv: KVHandle, blocks: Sequence[int]) -> None:
        """As ``Executor.start_import``."""
        self._calls.start(key, lambda call: self._copy_in(kv, blocks))

    def end_export(self, key: int) -> None:
        """As ``Executor.end_export``."""
        memory = self._exports.pop(key, None)
        if memory is not None:
            self.transport.withdraw(memory)

    def take(self) -> list[TransferOutcome]:
        """As ``Executor.take_transfers``."""
        outcomes = []
        for ended in self._calls.take():
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

    def _copy_out(self, blocks: Sequence[int], *, on_host: bool) -> SharedMemory:
        self._check()
        memory = SharedMemory(len(blocks) * self._pool.bytes_per_block)
        self._copier.read(blocks, memory.contents, on_host=on_host)
        return memory

    def _copy_in(self, kv: KVHandle, blocks: Sequence[int]) -> None:
        self._check()
        num_bytes = len(blocks) * self._pool.bytes_per_block
        if (kv.layout, kv.num_bytes) != (self._pool.layout, num_bytes):
            raise MemoryGoneError(f"{kv.num_bytes} bytes of {kv.layout} do not fit {num_bytes} of {self._pool.layout}")
        self._copier.write(blocks, self.transport.open(kv))

    def _check(self) -> None:
        if self.refusal is not None:
            raise MemoryGoneError(self.refusal)

    def _describe(self, memory: SharedMemory, seconds: float) -> KVHandle:
        num_bytes = len(memory.contents)
        return KVHandle(
            layout=self._pool.layout,
            num_blocks=num_bytes // self._pool.bytes_per_block,
            num_bytes=num_bytes,
            token=memory.token,
            pid=os.getpid(),
            descriptor=memory.descriptor,
            address=self.transport.offer(memory),
            seconds=seconds,
        )
