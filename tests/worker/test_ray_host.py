"""Where the ranks of a replica on Ray meet: at a port that is theirs from the moment it is told. Needs no ray."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.config import EngineConfig
from peft_dist.worker.ray_host import Order, RankHost, Site

ROOT = Path(__file__).parents[2]
# What a rank of the replica is here, in place of a worker.
RANK = """
from peft_dist.core.config import EngineConfig
from peft_dist.runner.rank_group import join_ranks, leave_ranks

ranks = join_ranks(EngineConfig(model="m", device="cpu", tensor_parallel_size=2))
assert ranks.agree(ranks.rank) == [0, 1]
leave_ranks()
"""


@pytest.fixture(autouse=True)
def ray_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1")
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(util=util, get_runtime_context=lambda: context))
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


def order(size: int) -> Order:
    engine = EngineConfig(model="m", device="cpu", tensor_parallel_size=size)
    return Order("tcp://127.0.0.1:1", ClusterKeys.make(), 0, 1, engine, "nobody:build", 1.0, "info")


def can_be_taken(site: Site) -> bool:
    try:
        socket.create_server((site.host, site.port)).close()
    except OSError as error:
        assert error.errno == errno.EADDRINUSE
        return False
    return True


@pytest.fixture
def starts_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks meet, and that is all."""
    from peft_dist.worker import ray_host

    monkeypatch.setattr(ray_host._RankLauncher, "_command", lambda self, folder: [sys.executable, "-c", RANK])


@pytest.mark.usefixtures("starts_ranks")
def test_nobody_else_can_take_the_port_and_the_ranks_meet_there() -> None:
    async def work() -> list[int]:
        hosts = [RankHost(order(2)) for _ in range(2)]
        sites = [await host.site(meets=rank == 0) for rank, host in enumerate(hosts)]
        assert sites[0].port and not sites[1].port
        assert not can_be_taken(sites[0]), "between the choice and the start"
        # The one that comes first finds nobody who answers, and waits.
        for rank in (1, 0):
            await hosts[rank].start(rank, sites[0])
            assert not can_be_taken(sites[0])
        codes = [await host.wait() for host in hosts]
        assert can_be_taken(sites[0]), "the actors hold it no longer than their ranks"
        return codes

    assert asyncio.run(work()) == [0, 0]


def test_a_rank_that_is_not_started_leaves_nothing_open() -> None:
    async def work() -> Site:
        host = RankHost(order(2))
        site = await host.site(meets=True)
        assert not can_be_taken(site)
        await host.kill()
        return site

    assert can_be_taken(asyncio.run(work()))


@pytest.mark.usefixtures("starts_ranks")
def test_a_start_that_fails_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    async def work() -> Site:
        host = RankHost(order(2))
        site = await host.site(meets=True)
        monkeypatch.setattr(asyncio, "create_subprocess_exec", fails)
        with pytest.raises(OSError, match="no more processes"):
            await host.start(0, site)
        return site

    assert can_be_taken(asyncio.run(work()))


def test_a_replica_of_one_rank_opens_no_port() -> None:
    site = asyncio.run(RankHost(order(1)).site(meets=False))
    assert msgspec.to_builtins(site) == {"node_id": "node", "host": "127.0.0.1", "port": 0}
