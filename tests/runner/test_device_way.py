"""KV that stays in device memory on its way to another replica: the protocol, with files in memory for the device's."""

from __future__ import annotations

import gc
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from peft_dist.core.handover import KVHandle
from peft_dist.engine.executor import TransferOutcome
from peft_dist.kernels.kv_pool import KVCachePool
from peft_dist.runner.descriptor_server import DescriptorServer, fetch_descriptor
from peft_dist.runner.device_memory import find_obstacle
from peft_dist.runner.device_way import GRAIN_BYTES, DeviceWay, choose_device_way
from peft_dist.runner.kv_transfers import KVTransfers
from peft_dist.runner.shared_memory import MemoryGoneError, SharedMemory, map_memory
from peft_dist.worker.kv_server import TcpTransport

CPU = torch.device("cpu")


class Flat:
    """As device memory is used: by copies alone, and by its open file."""

    def __init__(self, num_bytes: int, descriptor: int | None = None) -> None:
        self.num_bytes = num_bytes
        if descriptor is None:
            self._own = SharedMemory(num_bytes)
            self.descriptor, self._contents = self._own.descriptor, self._own.contents
        else:
            self.descriptor, self._contents = -1, map_memory(descriptor, num_bytes)[1]

    def put(self, offset: int, piece: torch.Tensor) -> None:
        self._contents[offset : offset + piece.nbytes].copy_(piece.flatten().view(torch.uint8))

    def get(self, offset: int, piece: torch.Tensor) -> None:
        piece.view(-1).view(torch.uint8).copy_(self._contents[offset : offset + piece.nbytes])


class Device:
    """One of a worker; ``reaches`` others' memory or does not."""

    def __init__(self, seed: int, *, reaches: bool = True, free_bytes: int = 1 << 30) -> None:
        self.reaches, self.num_maps = reaches, 0
        self.way = DeviceWay(CPU, Flat, self._map, lambda: free_bytes)
        self.pool = KVCachePool([(2, 4), (1, 8), (2, 4)], 12, 3, torch.float32, "cpu", 4)
        torch.manual_seed(seed)
        for group in self.pool.groups():
            group.copy_(torch.randn(group.shape))
        self.transfers = KVTransfers(self.pool, self.way)

    def _map(self, descriptor: int, num_bytes: int) -> Flat:
        self.num_maps += 1
        if not self.reaches:
            raise MemoryGoneError("no way there")
        return Flat(num_bytes, descriptor)

    def export(self, blocks: list[int], key: int = 1, *, on_host: bool = False) -> KVHandle:
        self.transfers.start_export(key, blocks, on_host=on_host)
        kv = self.wait().kv
        assert kv is not None
        return kv

    def fill(self, kv: KVHandle, blocks: list[int]) -> TransferOutcome:
        self.transfers.start_import(1, kv, blocks)
        return self.wait()

    def wait(self) -> TransferOutcome:
        while not (outcomes := self.transfers.take()):
            select.select([self.transfers.fileno()], [], [])
        [outcome] = outcomes
        return outcome

    def holds(self, blocks: list[int], other: Device, others: list[int]) -> bool:
        pairs = zip(self.pool.groups(), other.pool.groups(), strict=True)
        return all(torch.equal(own[:, :, blocks], theirs[:, :, others]) for own, theirs in pairs)


@pytest.fixture
def source() -> Iterator[Device]:
    made = Device(1)
    yield made
    made.transfers.close()


@pytest.fixture
def target() -> Iterator[Device]:
    made = Device(2)
    yield made
    made.transfers.close()


def num_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


TAKEN, GIVEN = [7, 0, 11, 3], [2, 9, 1, 0]


def test_blocks_go_from_device_to_device_and_leave_nothing_behind(source: Device, target: Device) -> None:
    files = num_files()
    kv = source.export(TAKEN)
    assert kv.server is not None and kv.num_bytes == 4 * source.pool.bytes_per_block
    assert target.fill(kv, GIVEN).error is None
    assert target.num_maps == 1 and target.holds(GIVEN, source, TAKEN)
    assert source.way._used == GRAIN_BYTES
    source.transfers.end_export(1)
    assert "MemoryGoneError" in str(target.fill(kv, GIVEN).error), "what was let go cannot be had any more"
    # The thread of what is copied ahead has let it go by the time it has done something else.
    source.transfers.start_export(2, [0], on_host=True, ahead=True)
    assert source.wait().error is None
    source.transfers.end_export(2)
    assert source.fill(kv, GIVEN).error is not None
    gc.collect()
    assert source.way._used == 0
    source.way.close()
    assert num_files() <= files
    assert "does not answer" in str(target.fill(kv, GIVEN).error)


def test_who_cannot_reach_the_device_gets_a_copy_on_the_host_and_knows_it_next_time(source: Device) -> None:
    far = Device(3, reaches=False)
    for round_ in range(2):
        kv = source.export(TAKEN, round_)
        assert far.fill(kv, GIVEN).error is None and far.holds(GIVEN, source, TAKEN)
        source.transfers.end_export(round_)
    assert far.num_maps == 1
    far.transfers.close()
    # One that has no such memory at all.
    plain = Device(4)
    plain.transfers = KVTransfers(plain.pool)
    assert plain.fill(source.export(TAKEN), GIVEN).error is None and plain.holds(GIVEN, source, TAKEN)
    plain.transfers.close()


def test_another_host_reads_a_copy_over_tcp(source: Device, target: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    source.transfers.transport = server = TcpTransport("tcp://127.0.0.1:*")
    target.transfers.transport = client = TcpTransport("tcp://127.0.0.1:*")
    kv = source.export(TAKEN)
    assert kv.server is not None and kv.address == server.address
    assert target.fill(kv, GIVEN).error is None and target.num_maps == 1, "on the same host it is mapped"
    assert source.transfers._exports[1]._copy is None, "and nobody needs a copy"  # type: ignore[union-attr]
    # What a host looks like to which files cannot be handed.
    elsewhere = replace(kv, server="nobody.is.here", pid=1 << 30)
    for far in (target, Device(5)):
        far.transfers.transport = client
        assert far.fill(elsewhere, GIVEN[::-1]).error is None and far.holds(GIVEN[::-1], source, TAKEN)
    assert target.num_maps == 1
    source.transfers.end_export(1)
    assert "let it go" in str(target.fill(elsewhere, GIVEN).error)
    assert "does not answer" in str(target.fill(replace(elsewhere, address=None), GIVEN).error)
    far.transfers.close()
    server.close()
    client.close()


def test_without_room_and_from_the_host_it_goes_through_host_memory(target: Device) -> None:
    full, source = Device(1, free_bytes=2 * GRAIN_BYTES - 1), Device(1)
    source.pool.swap_out([(5, 3)])
    for device, blocks, on_host in ((full, TAKEN, False), (source, [3], True)):
        kv = device.export(blocks, on_host=on_host)
        assert kv.server is None
        assert target.fill(kv, GIVEN[: len(blocks)]).error is None
        assert target.holds(GIVEN[: len(blocks)], device, [5] if on_host else blocks)
        device.transfers.close()


def test_device_memory_that_another_process_holds_outlives_it() -> None:
    owner = """
import sys
from peft_dist.runner.descriptor_server import DescriptorServer
from peft_dist.runner.shared_memory import SharedMemory
memory, server = SharedMemory(5), DescriptorServer()
memory.contents[:] = 7
server.offer("t" * 32, lambda kind: memory.descriptor)
print(server.address, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", owner], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        address = process.stdout.readline().decode().strip()
        descriptor = fetch_descriptor(address, "t" * 32, b"d")
        process.kill()
    memory = Flat(5, descriptor)
    os.close(descriptor)
    piece = torch.zeros(5, dtype=torch.uint8)
    memory.get(0, piece)
    assert piece.tolist() == [7] * 5
    with pytest.raises(MemoryGoneError, match="does not answer"):
        fetch_descriptor(address, "t" * 32, b"d")


def test_who_asks_wrongly_gets_nothing_and_hurts_nobody() -> None:
    server, memory = DescriptorServer(), SharedMemory(1)
    server.offer("t" * 32, lambda kind: memory.descriptor)
    for words in (b"", b"t" * 5, b"\xff" * 33):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(f"\0{server.address}")
            client.sendall(words)
    with pytest.raises(MemoryGoneError, match="let it go"):
        fetch_descriptor(server.address, "u" * 32, b"d")
    os.close(fetch_descriptor(server.address, "t" * 32, b"d"))
    server.withdraw("t" * 32)
    with pytest.raises(MemoryGoneError, match="let it go"):
        fetch_descriptor(server.address, "t" * 32, b"d")
    server.close()


def test_a_cpu_has_no_device_memory() -> None:
    assert find_obstacle(CPU) is not None and choose_device_way(CPU) is None
