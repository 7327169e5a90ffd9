"""What is Ray's alone: waiting for room, ranks on one node or two, and nothing that is left behind."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError, EngineDeadError
from peft_dist.core.restarts import RestartPolicy
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.service import EngineService
from peft_dist.worker import ray_cluster
from peft_dist.worker.ray_cluster import RaySettings
from tests.e2e.fault_scenario import make_cases, run_alone
from tests.e2e.ray_nodes import RayNodes, ray_nodes
from tests.e2e.test_clusters import WITHOUT_RAY
from tests.e2e.test_clusters import nodes_find_this_package as nodes_find_this_package
from tests.e2e.test_handover_processes import owner
from tests.e2e.test_processes import ENGINE, ended
from tests.e2e.test_replicas import SILENCE, read_many, until
from tests.tiny_models import make_model

pytest.importorskip("ray", reason=WITHOUT_RAY)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

# A server that is killed: its workers have to notice.
SERVER = """
import asyncio, sys
from peft_dist.worker import ray_cluster
from peft_dist.worker.ray_cluster import RaySettings
from tests.e2e.ray_nodes import RayNodes
from tests.e2e.test_ray_nodes import started

async def main():
    settings = RaySettings(sys.argv[1])
    async with started(RayNodes(ray_cluster.connect(settings), settings), 1) as service:
        print("pid", service.replica_pids()[0], flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def started(nodes: RayNodes, num_replicas: int, wait: bool = True, **more: Any) -> AsyncIterator[EngineService]:
    """Around fake engines; ``wait``: until they are ready."""
    options = {"replica_factory": "tests.worker.fake_replica:build", **more}
    launcher, link = nodes.launcher(ENGINE, num_replicas, SILENCE / 5, **options)
    restart = RestartPolicy(first=0.01, longest=0.1)
    core = OrchestratorOptions(max_num_seqs=64, max_queue=64, seed=1, heartbeat_timeout=SILENCE, restart=restart)
    service = EngineService(launcher, core, num_replicas=num_replicas, stop_grace=2.0, link=link)
    try:
        if wait:
            await service.start()
        yield service
    finally:
        await service.stop()


def run(work: Any) -> None:
    asyncio.run(asyncio.wait_for(work, 120))


def test_a_replica_waits_for_room_and_takes_it(caplog: pytest.LogCaptureFixture) -> None:
    async def work(nodes: RayNodes) -> None:
        async with started(nodes, 2) as service:
            assert nodes.node_of(0) != nodes.node_of(1)
            readers = read_many(service, 12, "r")
            await until(lambda: all(view.stats.num_running for view in service.replicas()))
            pid = service.replica_pids()[0]
            await nodes.remove(0)
            for reader in readers:
                await reader.check()
            await until(lambda: "replica 0 waits for room" in caplog.text)
            assert ended(pid) and set(service.replica_pids()) == {1} and service.is_healthy
            await nodes.add()
            await until(lambda: len(service.replica_pids()) == 2)
            for reader in read_many(service, 12, "again"):
                await reader.check()

    caplog.set_level(logging.WARNING, logger="peft_dist.worker.ray_launcher")
    with ray_nodes(2) as nodes:
        run(work(nodes))
    assert "300 s at most: it takes 1 CPU, free: none" in caplog.text


def test_no_room_in_time_is_told_with_the_remedy() -> None:
    async def work(nodes: RayNodes) -> None:
        async with started(nodes, 2, wait=False) as service:
            with pytest.raises(EngineDeadError, match=r"Replica 1 .* no room for 1 CPU in 3 s: add nodes .*--replicas"):
                await service.start()

    with ray_nodes(1, placement_timeout=3.0) as nodes:
        run(work(nodes))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_is_started_again(number: signal.Signals) -> None:
    async def work(nodes: RayNodes) -> None:
        async with started(nodes, 2) as service:
            readers = read_many(service, 12, "r")
            await until(lambda: all(view.stats.num_running for view in service.replicas()))
            victim = service.replica_pids()[0]
            os.kill(victim, number)
            for reader in readers:
                await reader.check()
            await until(lambda: service.replica_pids().get(0, victim) != victim)
            assert ended(victim), "its room was given to another while it was there"
            await service.drain_replica(1, restart=True)
            await until(lambda: len(service.replica_pids()) == 2)
            assert [view.num_restarts for view in service.replicas()] == [1, 1]
            pids = service.replica_pids()
        assert all(ended(pid) for pid in pids.values())

    with ray_nodes(2) as nodes:
        run(work(nodes))
        from ray.util import placement_group_table

        assert {group["state"] for group in placement_group_table().values()} == {"REMOVED"}


def test_what_a_worker_logs_reaches_the_user(capfd: pytest.CaptureFixture[str]) -> None:
    async def work(nodes: RayNodes) -> None:
        factory = "tests.worker.fake_replica:build_failing"
        async with started(nodes, 1, wait=False, replica_factory=factory) as service:
            with pytest.raises(EngineDeadError, match="cannot be loaded: choose another"):
                await service.start()
            # Ray brings it about once a second.
            heard = ""
            while "ERROR [replica 0] replica 0 cannot go on" not in heard:
                heard += "".join(capfd.readouterr())
                await asyncio.sleep(0.05)

    with ray_nodes(1) as nodes:
        run(work(nodes))


def test_nothing_outlives_a_server_that_is_killed() -> None:
    with ray_nodes(1) as nodes:
        command = [sys.executable, "-c", SERVER, str(nodes.settings.address)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            pid = next(int(line.split()[1]) for line in server.stdout if line.startswith("pid "))
            server.kill()
            assert ended(pid)


@pytest.mark.parametrize("cpus", [2, 1])
def test_ranks_of_a_replica_are_on_one_node_if_they_fit(cpus: int, tmp_path: Path) -> None:
    """Two nodes of two CPUs, or of one each; the same tokens as one process."""
    make_model("llama", tmp_path / "model")
    cases = make_cases(4, 20, 96, [None])
    run_alone(tmp_path / "model", {}, cases, num_blocks=64, num_threads=1)
    engine = EngineConfig(
        model=str(tmp_path / "model"), device="cpu", num_threads=1, num_blocks=64, tensor_parallel_size=2
    )

    async def work(nodes: RayNodes) -> None:
        launcher, link = nodes.launcher(engine, 1, 1.0)
        service = EngineService(launcher, OrchestratorOptions(seed=1), stop_grace=5.0, link=link)
        try:
            await service.start()
            assert len(nodes.nodes_of(0)) == 2 // cpus
            await asyncio.gather(*(case.run(service, f"r{i}") for i, case in enumerate(cases)))
            for case in cases:
                case.check()
        finally:
            await service.stop()

    with ray_nodes(2, cpus=cpus) as nodes:
        run(work(nodes))


def test_requests_move_with_their_kv_to_another_host(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "model")
    cases = make_cases(8, 200, 96, [None])
    run_alone(tmp_path / "model", {}, cases, num_blocks=256, num_threads=1)
    engine = EngineConfig(model=str(tmp_path / "model"), device="cpu", num_threads=1, num_blocks=256)

    async def work(nodes: RayNodes) -> None:
        launcher, link = nodes.launcher(engine, 2, 1.0, replica_factory="tests.worker.far_replica:build")
        options = OrchestratorOptions(max_num_seqs=64, seed=1, migration="rr")
        service = EngineService(launcher, options, num_replicas=2, stop_grace=5.0, link=link)
        try:
            await service.start()
            reading = [asyncio.create_task(case.run(service, f"r{i}")) for i, case in enumerate(cases)]
            await until(lambda: all(len(case.tokens) > 20 for case in cases))
            owners = [owner(service, f"r{i}") for i in range(len(cases))]
            for i, replica_id in enumerate(owners):
                assert replica_id is not None
                service.move_request(f"r{i}", 1 - replica_id, with_kv=True)
            await asyncio.gather(*reading)
            for case in cases:
                case.check()
            handover = service._core.handover
            assert (handover.num_with_kv, handover.num_recomputed, handover.num_failed) == (len(cases), 0, 0)
        finally:
            await service.stop()

    with ray_nodes(2) as nodes:
        run(work(nodes))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_a_cluster_that_is_not_there(address: str) -> None:
    with pytest.raises(ConfigError, match=rf"--ray-address {address}: no Ray cluster .*ray start --head"):
        ray_cluster.connect(RaySettings(address))
