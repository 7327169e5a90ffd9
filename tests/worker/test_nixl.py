"""KV of other hosts that is read by NIXL, with a stand-in for the library: what is chosen, and what goes wrong."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.config import EngineConfig, KVTransfer
from peft_dist.core.handover import KVHandle
from peft_dist.runner.shared_memory import MemoryGoneError
from peft_dist.worker import nixl_way
from peft_dist.worker.config import WorkerConfig
from peft_dist.worker.kv_client import CHUNK_BYTES
from peft_dist.worker.kv_server import TcpTransport
from peft_dist.worker.nixl_fetching import WINDOW
from peft_dist.worker.nixl_messages import NUM_PIECES, PIECE_BYTES, RETURN
from peft_dist.worker.nixl_server import Answer, NixlServer
from peft_dist.worker.process import _serve_kv
from tests.worker.kv_exports import offered
from tests.worker.nixl_stand_in import BackendError, DisconnectError, World, install

Make = Callable[..., TcpTransport]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> World:
    caplog.set_level(logging.INFO, "peft_dist")
    return install(monkeypatch)


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[TcpTransport] = []

    def one(*, with_nixl: bool = True, silence_ms: int = 5000, keys: ClusterKeys | None = None) -> TcpTransport:
        made.append(TcpTransport("tcp://127.0.0.1:*", silence_ms, keys, with_nixl=with_nixl))
        return made[-1]

    yield one
    for transport in made:
        transport.close()


def words(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Of the moves' ways, without those that tell how a process begins."""
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("KV of")]


@pytest.mark.parametrize("num_bytes", [1, PIECE_BYTES, 3 * PIECE_BYTES + 7, (2 * NUM_PIECES + 1) * PIECE_BYTES])
def test_all_bytes_arrive_in_their_places(
    world: World, make: Make, caplog: pytest.LogCaptureFixture, num_bytes: int
) -> None:
    keys = ClusterKeys.make()
    owner, reader = make(keys=keys), make(keys=keys)
    memory, handle = offered(owner, num_bytes)
    for _ in range(2):
        assert torch.equal(reader.open(handle), memory.contents)
    assert [transfer.ours[1] for transfer in world.transfers].count(PIECE_BYTES) == 2 * (num_bytes // PIECE_BYTES)
    assert sum(transfer.ours[1] for transfer in world.transfers) == 2 * num_bytes
    assert all(transfer.releases == 1 for transfer in world.transfers)
    # One connection for both, and nothing is said of another way.
    assert words(caplog) == [f"KV of {owner.address} comes by NIXL"] and len(world.connected) == 1


def test_memory_is_registered_once_and_given_back(world: World, make: Make) -> None:
    owner = TcpTransport("tcp://127.0.0.1:*", with_nixl=True)
    memory, handle = offered(owner, 100)
    lengths = [length for _, length in world.registered]
    assert lengths == [NUM_PIECES * PIECE_BYTES] * 2
    assert torch.equal(make().open(handle), memory.contents)
    assert len(world.registered) == 4
    owner.close()
    assert len(world.registered) == 2


def test_what_only_this_machine_reaches_uses_its_loopback_alone(
    world: World, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    make()
    assert "whoever reaches" not in caplog.text
    TcpTransport("tcp://0.0.0.0:*", keys=ClusterKeys.make(), with_nixl=True).close()
    assert world.devices == ["lo", "lo", None, None]
    assert caplog.records[-1].levelname == "WARNING" and "whoever reaches UCX's ports" in caplog.text


@pytest.mark.parametrize(("kv_transfer", "num_agents"), [("auto", 0), ("host", 0), ("nixl", 2)])
def test_a_worker_uses_it_where_it_is_asked_for(world: World, kv_transfer: KVTransfer, num_agents: int) -> None:
    engine, used = EngineConfig("model", kv_transfer=kv_transfer), mock.Mock()
    config = WorkerConfig(endpoint="ipc://x", replica_id=0, epoch=1, engine=engine, kv_endpoint="tcp://127.0.0.1:*")
    server = _serve_kv(config, used)
    assert server is not None and used.use_transport.call_args.args == (server,)
    assert len(world.agents) == num_agents
    server.close()
    assert not world.registered


def test_a_worker_that_nobody_reaches_says_that_it_is_of_no_use(world: World, caplog: pytest.LogCaptureFixture) -> None:
    engine = EngineConfig("model", kv_transfer="nixl")
    assert _serve_kv(WorkerConfig(endpoint="ipc://x", replica_id=0, epoch=1, engine=engine), mock.Mock()) is None
    assert "kv_transfer='nixl' changes nothing" in caplog.text and not world.agents


def test_without_being_asked_for_the_library_is_left_alone(world: World, make: Make) -> None:
    make(with_nixl=False)
    assert not world.agents


def test_an_owner_without_it_is_read_over_tcp_and_not_asked_again_at_once(
    world: World, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    owner, reader = make(with_nixl=False), make()
    memory, handle = offered(owner, CHUNK_BYTES + 3)
    for _ in range(3):
        assert torch.equal(reader.open(handle), memory.contents)
    assert words(caplog) == [f"KV of {owner.address} comes over TCP, for 60 s: there is no NIXL"]
    assert not world.transfers


def test_a_reader_without_it_is_served_over_tcp(world: World, make: Make) -> None:
    memory, handle = offered(make(), CHUNK_BYTES + 3)
    assert torch.equal(make(with_nixl=False).open(handle), memory.contents)
    assert not world.transfers


@pytest.mark.parametrize("cause", ["library", "back end"])
def test_where_it_cannot_be_had_tcp_remains_and_the_log_says_why(
    world: World, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cause: str
) -> None:
    if cause == "library":
        monkeypatch.setitem(sys.modules, "nixl._api", None)
    else:
        world.missing = True
    owner, reader = make(), make()
    said = {record.getMessage() for record in caplog.records}
    assert len(said) == 1 and "over TCP, not by NIXL" in caplog.text
    assert (
        "pip install 'peft-dist[nixl]'" if cause == "library" else "BackendError: NIXL_ERR_NOT_FOUND"
    ) in caplog.text
    memory, handle = offered(owner, CHUNK_BYTES + 3)
    assert torch.equal(reader.open(handle), memory.contents)
    assert not world.registered


def test_what_was_withdrawn_is_gone_and_nothing_to_hold_against_the_way(
    world: World, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    owner, reader = make(), make()
    memory, handle = offered(owner, 100)
    owner.withdraw(memory.token)
    with pytest.raises(MemoryGoneError, match="let it go"):
        reader.open(handle)
    memory, handle = offered(owner, 100)
    # The whole is not as long as it is said to be.
    with pytest.raises(MemoryGoneError, match="let it go"):
        reader.open(KVHandle("layout", 1, 101, memory.token, 1 << 30, 3, owner.address))
    assert torch.equal(reader.open(handle), memory.contents)
    assert words(caplog) == [f"KV of {owner.address} comes by NIXL"]


def test_a_transfer_that_fails_is_done_over_tcp_and_the_next_one_connects_anew(
    world: World, make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_way, "_UNFIT_SECONDS", 0.0)
    owner, reader = make(), make()
    memory, handle = offered(owner, 2 * NUM_PIECES * PIECE_BYTES)
    world.failing = DisconnectError("NIXL_ERR_REMOTE_DISCONNECT")
    assert torch.equal(reader.open(handle), memory.contents)
    assert "over TCP, for 0 s: DisconnectError: NIXL_ERR_REMOTE_DISCONNECT" in words(caplog)[-1]
    assert world.disconnected == world.connected and len(world.connected) == 1
    world.failing = None
    num_failed = len(world.transfers)
    assert torch.equal(reader.open(handle), memory.contents)
    assert len(world.transfers) - num_failed == 2 * NUM_PIECES and len(world.connected) == 2


def test_the_memory_of_transfers_that_stall_is_not_used_before_they_end(
    world: World, make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_way, "_UNFIT_SECONDS", 0.0)
    owner, reader = make(), make(silence_ms=100)
    memory, handle = offered(owner, NUM_PIECES * PIECE_BYTES)
    world.stands_still = True
    for number in (1, 2):
        assert torch.equal(reader.open(handle), memory.contents)
        assert "over TCP, for 0 s: nothing came for 0.05 s" in words(caplog)[-1]
        assert len(world.under_way()) == number * WINDOW and not world.disconnected
    targets = {transfer.ours[0] for transfer in world.under_way()}
    assert len(targets) == NUM_PIECES
    # There is none left for a third time.
    assert torch.equal(reader.open(handle), memory.contents)
    assert words(caplog)[-1].endswith(f"{NUM_PIECES} transfers that stalled have not ended yet")
    assert len(world.under_way()) == NUM_PIECES
    world.stands_still = False
    for transfer in world.under_way():
        transfer.finish()
    num_stalled = len(world.transfers)
    # This one has lent all that it has, until it gives up those that stalled.
    memory, handle = offered(make(), NUM_PIECES * PIECE_BYTES)
    assert torch.equal(reader.open(handle), memory.contents)
    assert len(world.transfers) == num_stalled + NUM_PIECES and len(world.connected) == 2


def test_what_was_read_after_its_loan_is_not_taken(
    world: World, make: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = NixlServer.answer

    def end_loans(self: NixlServer, who: bytes, token: bytes, request: bytes) -> list[Answer] | None:
        if request[:1] == RETURN:
            self._clock = lambda: float("inf")
            self.progress()
        return answer(self, who, token, request)

    monkeypatch.setattr(NixlServer, "answer", end_loans)
    owner, reader = make(), make()
    memory, handle = offered(owner, PIECE_BYTES)
    assert torch.equal(reader.open(handle), memory.contents)
    assert words(caplog)[-1].endswith("over TCP, for 60 s: a piece was lent to another before it was read")


def test_an_owner_whose_agent_fails_goes_on_over_tcp(
    world: World, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    owner, reader = make(), make(silence_ms=400)
    memory, handle = offered(owner, NUM_PIECES * PIECE_BYTES)
    world.broken = BackendError("NIXL_ERR_BACKEND")
    assert torch.equal(reader.open(handle), memory.contents)
    assert "KV goes to other hosts over TCP from now on: NIXL failed (BackendError: NIXL_ERR_BACKEND)" in caplog.text
    world.broken, other = None, make()
    assert torch.equal(other.open(handle), memory.contents)
    assert words(caplog)[-1] == f"KV of {owner.address} comes over TCP, for 60 s: there is no NIXL"


def test_several_readers_share_what_the_owner_lends(world: World, make: Make, caplog: pytest.LogCaptureFixture) -> None:
    owner, readers = make(), [make() for _ in range(4)]
    memory, handle = offered(owner, 3 * NUM_PIECES * PIECE_BYTES + 5)
    got: list[bool] = []
    threads = [
        threading.Thread(target=lambda each=each: got.append(torch.equal(each.open(handle), memory.contents)))
        for each in readers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [True] * 4 and not [line for line in words(caplog) if "TCP" in line]


def test_a_process_that_ends_does_not_wait_for_what_stalls(world: World, make: Make) -> None:
    owner, reader = make(), TcpTransport("tcp://127.0.0.1:*", 600_000, with_nixl=True)
    _, handle = offered(owner, PIECE_BYTES)
    world.stands_still = True
    ended = threading.Event()

    def fetch() -> None:
        assert reader._nixl is not None
        assert reader._nixl.fetch(owner.address, handle.token, handle.num_bytes, None) is None
        ended.set()

    thread = threading.Thread(target=fetch)
    thread.start()
    assert world.has_begun.wait(60)
    reader.close()
    thread.join()
    assert ended.is_set() and len(world.registered) == 2
