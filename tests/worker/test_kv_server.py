"""Exported KV that is read over TCP, as from another host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import zmq

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.errors import ConfigError
from peft_dist.core.handover import KVHandle
from peft_dist.runner.shared_memory import MemoryGoneError
from peft_dist.worker.kv_client import CHUNK_BYTES, fetch
from peft_dist.worker.kv_server import TcpTransport
from tests.worker.kv_exports import offered


@pytest.fixture
def server() -> Iterator[TcpTransport]:
    made = TcpTransport("tcp://127.0.0.1:*")
    yield made
    made.close()


@pytest.fixture
def guarded() -> Iterator[tuple[TcpTransport, ClusterKeys]]:
    keys = ClusterKeys.make()
    made = TcpTransport("tcp://127.0.0.1:*", keys=keys)
    yield made, keys
    made.close()


@pytest.mark.parametrize("num_bytes", [1, CHUNK_BYTES, 3 * CHUNK_BYTES + 7, 20 * CHUNK_BYTES])
def test_all_bytes_arrive_in_their_places(server: TcpTransport, num_bytes: int) -> None:
    memory, handle = offered(server, num_bytes)
    assert torch.equal(server.open(handle), memory.contents)


def test_what_was_withdrawn_or_never_offered_is_gone(server: TcpTransport) -> None:
    memory, handle = offered(server, 100)
    server.withdraw(memory.token)
    with pytest.raises(MemoryGoneError, match="let it go"):
        server.open(handle)
    with pytest.raises(MemoryGoneError, match="cannot be opened"):
        server.open(KVHandle("layout", 1, 100, memory.token, 1 << 30, 3))


def test_memory_that_cannot_be_had_hurts_nobody_else(server: TcpTransport) -> None:
    memory, handle = offered(server, 100)

    def fail() -> torch.Tensor:
        raise RuntimeError("the device has failed")

    server.offer("broken", fail)
    with pytest.raises(MemoryGoneError, match="let it go"):
        server.open(KVHandle("layout", 1, 100, "broken", 1 << 30, 3, server.address))
    assert torch.equal(server.open(handle), memory.contents)


def test_who_asks_wrongly_gets_nothing_and_hurts_nobody(server: TcpTransport) -> None:
    memory, handle = offered(server, 100)
    with zmq.Context() as context, context.socket(zmq.SocketType.DEALER) as socket:
        socket.connect(server.address)
        beyond = b"\xff" * 16
        for parts in ([b"one part"], [b"a"] * 5, [b"\xff", b"what"], [memory.token.encode(), beyond]):
            socket.send_multipart(parts)
        assert [socket.recv_multipart() for _ in range(2)] == [[b"what", b""], [beyond, b""]]
    assert torch.equal(server.open(handle), memory.contents)


def test_a_host_that_does_not_answer_is_given_up() -> None:
    with zmq.Context() as context, context.socket(zmq.SocketType.ROUTER) as deaf:
        deaf.bind("tcp://127.0.0.1:*")
        with pytest.raises(MemoryGoneError, match="does not answer"):
            fetch(deaf.get_string(zmq.SocketOption.LAST_ENDPOINT), "token", 100, silence_ms=50)


def test_one_that_did_not_answer_is_not_waited_for_again_at_once(server: TcpTransport) -> None:
    memory, handle = offered(server, 100)
    with zmq.Context() as context, context.socket(zmq.SocketType.ROUTER) as deaf:
        deaf.bind("tcp://127.0.0.1:*")
        # Long enough for the question to get there.
        server._silence_ms = 1000
        silent = KVHandle("layout", 1, 100, "t", 1 << 30, 3, deaf.get_string(zmq.SocketOption.LAST_ENDPOINT))
        with pytest.raises(MemoryGoneError, match="does not answer"):
            server.open(silent)
        server._silence_ms = 20_000
        assert deaf.poll(20_000) and deaf.recv_multipart()
        with pytest.raises(MemoryGoneError, match="did not answer a moment ago"):
            server.open(silent)
        assert not deaf.poll(0), "it was not asked again"
    assert torch.equal(server.open(handle), memory.contents), "others are"
    server.withdraw(memory.token)
    for _ in range(2):
        with pytest.raises(MemoryGoneError, match="let it go"):
            server.open(handle)


def test_with_keys_only_their_holders_read(guarded: tuple[TcpTransport, ClusterKeys]) -> None:
    server, keys = guarded
    memory, handle = offered(server, 3 * CHUNK_BYTES + 7)
    assert torch.equal(server.open(handle), memory.contents)
    for other in (None, ClusterKeys.make()):
        with pytest.raises(MemoryGoneError, match="does not answer"):
            fetch(server.address, memory.token, 100, 200, other)
    assert torch.equal(fetch(server.address, memory.token, 100, 20_000, keys), memory.contents[:100])


@pytest.mark.parametrize(
    ("endpoint", "keys", "words"),
    [
        ("tcp://0.0.0.0:*", None, "can be reached from other machines: it needs a key_file"),
        ("tcp://192.0.2.250:*", ClusterKeys.make(), "cannot be used"),
    ],
)
def test_addresses_where_no_kv_is_offered(endpoint: str, keys: ClusterKeys | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TcpTransport(endpoint, keys=keys)
