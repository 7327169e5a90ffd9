"""KV blocks that go from one process to another by NIXL itself, where it is installed (``pip install .[nixl]``)."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
import torch
from msgspec.structs import replace

from peft_dist.core.handover import KVHandle
from peft_dist.kernels.kv_pool import KVCachePool
from peft_dist.runner.kv_transfers import KVTransfers
from peft_dist.worker.kv_server import TcpTransport
from peft_dist.worker.nixl_agent import NixlAgent, Read
from tests.worker.nixl_owner import BLOCKS, make_pool, outcome, serve

pytest.importorskip("nixl")

TARGETS = list(reversed(range(len(BLOCKS))))


class Owner:
    """A process that has exported blocks of its pool."""

    def __init__(self, process: BaseProcess, orders: Connection, seed: int) -> None:
        self.process, self.orders, self.pool = process, orders, make_pool(seed)
        handle: KVHandle = orders.recv()
        # No such process is on this host.
        self.handle = replace(handle, pid=1 << 30)

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@contextmanager
def owner(seed: int) -> Iterator[Owner]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, seed), daemon=True)
    process.start()
    theirs.close()
    try:
        made = Owner(process, ours, seed)
        yield made
        if process.is_alive():
            ours.send("end")
            process.join(60)
            assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


class Reader:
    """The side that imports, in this process."""

    def __init__(self) -> None:
        self.pool: KVCachePool = make_pool(0)
        self.transport = TcpTransport("tcp://127.0.0.1:*", silence_ms=1000, with_nixl=True)
        self.transfers = KVTransfers(self.pool)
        self.transfers.transport = self.transport

    def fetch(self, handle: KVHandle) -> str | None:
        """The error."""
        self.transfers.start_import(1, handle, TARGETS)
        return outcome(self.transfers).error

    def has_blocks_of(self, owner: Owner) -> bool:
        """Whether they are the owner's, and no others were touched."""
        fresh = make_pool(0)
        for group, theirs, before in zip(self.pool.groups(), owner.pool.groups(), fresh.groups(), strict=True):
            before[:, :, TARGETS] = theirs[:, :, BLOCKS]
            if not torch.equal(group, before):
                return False
        return True

    def is_untouched(self) -> bool:
        both = zip(self.pool.groups(), make_pool(0).groups(), strict=True)
        return all(torch.equal(group, before) for group, before in both)


@pytest.fixture(params=["tcp", "all"])
def reader(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Reader]:
    """As between two hosts; and as UCX likes it best, which on one host is that the system copies memory."""
    monkeypatch.setenv("UCX_TLS", request.param)
    caplog.set_level("INFO", "peft_dist")
    made = Reader()
    yield made
    made.transport.close()
    made.transfers.close()


def came_by_nixl(caplog: pytest.LogCaptureFixture, handle: KVHandle) -> bool:
    said = [record.getMessage() for record in caplog.records if str(handle.address) in record.getMessage()]
    return said == [f"KV of {handle.address} comes by NIXL"]


def test_blocks_arrive_in_their_places(reader: Reader, caplog: pytest.LogCaptureFixture) -> None:
    with owner(1) as first, owner(2) as second:
        assert first.handle.num_bytes > 30 << 20
        for each in (first, second, first):
            assert reader.fetch(each.handle) is None
            assert reader.has_blocks_of(each)
            assert came_by_nixl(caplog, each.handle)
        first.orders.send("withdraw")
        assert first.orders.recv() == "withdrawn"
        error = reader.fetch(first.handle)
        assert error is not None and "let it go" in error
        assert reader.has_blocks_of(first)


def test_an_owner_that_is_killed_meanwhile_is_an_error_and_others_are_read(
    reader: Reader, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = NixlAgent.start_read

    with owner(1) as killed, owner(2) as other:

        def killing(self: NixlAgent, peer: str, address: int, first: int, length: int) -> Read:
            read = start(self, peer, address, first, length)
            killed.kill()
            return read

        monkeypatch.setattr(NixlAgent, "start_read", killing)
        error = reader.fetch(killed.handle)
        assert error is not None and error.startswith("NoAnswerError")
        assert reader.is_untouched()
        monkeypatch.setattr(NixlAgent, "start_read", start)
        assert f"KV of {killed.handle.address} comes over TCP" in caplog.text
        assert reader.fetch(other.handle) is None
        assert reader.has_blocks_of(other) and came_by_nixl(caplog, other.handle)


def test_what_comes_late_of_one_that_was_stopped_does_no_harm(
    reader: Reader, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = NixlAgent.start_read
    monkeypatch.setattr("peft_dist.worker.kv_server._SILENT_SECONDS", 0.0)
    monkeypatch.setattr("peft_dist.worker.nixl_way._UNFIT_SECONDS", 0.0)
    with owner(1) as stopped, owner(2) as other:

        def stopping(self: NixlAgent, peer: str, address: int, first: int, length: int) -> Read:
            stopped.send(signal.SIGSTOP)
            return start(self, peer, address, first, length)

        monkeypatch.setattr(NixlAgent, "start_read", stopping)
        error = reader.fetch(stopped.handle)
        assert error is not None and error.startswith("NoAnswerError") and reader.is_untouched()
        monkeypatch.setattr(NixlAgent, "start_read", start)
        stopped.send(signal.SIGCONT)
        for each in (other, stopped, other):
            assert reader.fetch(each.handle) is None
            assert reader.has_blocks_of(each)
        assert came_by_nixl(caplog, other.handle)
