"""Where KV is served: as open as the orchestrator's socket, and never further without keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.handover import KVHandle
from peft_dist.runner.shared_memory import SharedMemory
from peft_dist.worker.config import WorkerConfig
from peft_dist.worker.joining import JoinSettings, _kv_endpoint
from peft_dist.worker.kv_address import of_guest, of_server, reachable
from peft_dist.worker.kv_server import TcpTransport
from tests.e2e.test_processes import ENGINE


@pytest.mark.parametrize(
    ("listen", "has_keys", "endpoint"),
    [
        ("tcp://127.0.0.1:5600", False, "tcp://127.0.0.1:*"),
        ("tcp://localhost:5600", False, "tcp://127.0.0.1:*"),
        ("tcp://[::1]:5600", False, None),
        ("tcp://10.0.0.5:5600", True, "tcp://10.0.0.5:*"),
        ("tcp://0.0.0.0:5600", True, "tcp://0.0.0.0:*"),
        ("tcp://0.0.0.0:5600", False, None),
    ],
)
def test_the_servers_replicas_serve_where_it_listens(listen: str, has_keys: bool, endpoint: str | None) -> None:
    assert of_server(listen, has_keys=has_keys) == endpoint


def test_a_guest_serves_at_its_address_on_the_way_to_the_server(caplog: pytest.LogCaptureFixture) -> None:
    for server in ("tcp://127.0.0.1:5600", "tcp://localhost:5600"):
        assert of_guest(server, has_keys=False) == of_guest(server, has_keys=True) == "tcp://127.0.0.1:*"
    assert not caplog.records
    assert of_guest("tcp://nobody.invalid:5600", has_keys=True) is None
    assert "no address of this one reaches tcp://nobody.invalid:5600" in caplog.text


def test_what_was_asked_for_counts() -> None:
    def of(endpoint: str | None) -> str | None:
        return _kv_endpoint(JoinSettings("tcp://127.0.0.1:5600", None, {}, kv_endpoint=endpoint))

    assert of(None) == "tcp://127.0.0.1:*" and of("none") is None and of("tcp://10.0.0.9:*") == "tcp://10.0.0.9:*"


def test_every_address_is_the_orchestrators_host() -> None:
    assert reachable("tcp://0.0.0.0:7001", "10.0.0.5") == "tcp://10.0.0.5:7001"
    assert reachable("tcp://10.0.0.7:7001", "10.0.0.5") == "tcp://10.0.0.7:7001"
    assert reachable("tcp://0.0.0.0:7001", None) == "tcp://0.0.0.0:7001"
    keys = ClusterKeys.make()
    server, guest = (
        TcpTransport("tcp://0.0.0.0:*", keys=keys),
        TcpTransport("tcp://127.0.0.1:*", keys=keys, home="127.0.0.1"),
    )
    memory = SharedMemory(5)
    memory.contents[:] = 7
    address = server.offer(memory.token, lambda: memory.contents)
    assert address is not None and address.startswith("tcp://0.0.0.0:")
    found = guest.open(KVHandle("layout", 1, 5, memory.token, 1 << 30, 3, address))
    assert torch.equal(found, memory.contents)
    server.close()
    guest.close()


def test_the_socket_of_one_host_asks_for_no_keys(tmp_path: Path) -> None:
    keys = ClusterKeys.make()
    file = tmp_path / "keys.json"
    keys.write(file)
    for endpoint, wanted in (("ipc:///tmp/orchestrator", None), ("tcp://127.0.0.1:5600", keys)):
        config = WorkerConfig(endpoint=endpoint, replica_id=0, epoch=1, engine=ENGINE, key_file=str(file))
        assert config.link_keys() == wanted and config.keys() == keys
