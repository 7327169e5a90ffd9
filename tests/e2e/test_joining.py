"""Replicas that join a running server over TCP: keys, leaving, dying, and links that are cut and healed."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.errors import ConfigError
from peft_dist.core.joining import Join
from peft_dist.core.messages import encode_report
from peft_dist.core.restarts import RestartPolicy
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.guests import Invitation
from peft_dist.orchestrator.service import EngineService
from peft_dist.worker.joining import JoinSettings, join
from peft_dist.worker.launcher import PlainLauncher
from tests.e2e.test_processes import ENGINE, adapter, run
from tests.e2e.test_processes import workers_find_the_fake as workers_find_the_fake
from tests.e2e.test_replicas import SILENCE, Reader, read_many, until
from tests.ports import free_address
from tests.relay import Relay
from tests.tiny_models import make_model

FACTORY = "tests.worker.fake_replica:build"
LOOPBACK = "tcp://127.0.0.1:0"


@asynccontextmanager
async def started(num_replicas: int, keys: ClusterKeys | None = None) -> AsyncIterator[EngineService]:
    """A service that others may join; not waited for where it has no replica of its own."""
    launcher = PlainLauncher(
        ENGINE, replica_factory=FACTORY, log_level="critical", heartbeat_seconds=SILENCE / 5, num_replicas=2
    )
    options = OrchestratorOptions(max_num_seqs=64, max_queue=64, seed=1, heartbeat_timeout=SILENCE)
    invitation = Invitation(LOOPBACK, ENGINE, FACTORY, keys, heartbeat_seconds=SILENCE / 5)
    service = EngineService(launcher, options, num_replicas=num_replicas, stop_grace=2.0, invitation=invitation)
    starting = asyncio.create_task(service.start())
    try:
        if num_replicas:
            await starting
        yield service
        await starting
    finally:
        await service.stop()


class Guest:
    """``peft-dist worker`` in this process; its replica has a process of its own."""

    def __init__(self, address: str, key_file: Path | None = None) -> None:
        self._stop = asyncio.Event()
        settings = JoinSettings(
            address,
            key_file,
            {"num_threads": 1},
            launcher="plain",
            # Torch, which serves it, takes longer to import than a fake does to run.
            kv_endpoint="none",
            silence=2 * SILENCE,
            log_level="critical",
        )
        self.task = asyncio.create_task(join(settings, self._stop))

    async def leave(self) -> int:
        self._stop.set()
        return await self.task


@asynccontextmanager
async def guest(address: str, key_file: Path | None = None) -> AsyncIterator[Guest]:
    one = Guest(address, key_file)
    try:
        yield one
    finally:
        await one.leave()


@asynccontextmanager
async def relayed() -> AsyncIterator[tuple[EngineService, Relay]]:
    """A service with a replica of its own and one that joined it by the relay; both are ready."""
    async with started(1) as service, Relay(address_of(service)) as relay, guest(relay.address):
        await until(lambda: ids(service) == {0, 1})
        yield service, relay


def address_of(service: EngineService) -> str:
    assert service.guests is not None
    return service.guests.endpoint


def ids(service: EngineService) -> set[int]:
    return set(service.replica_pids())


async def check(readers: list[Reader]) -> None:
    for reader in readers:
        await reader.check()


def test_a_replica_joins_with_the_key_and_leaves_without_losing_a_request(tmp_path: Path) -> None:
    keys = ClusterKeys.make()
    keys.write(tmp_path / "keys.json")

    async def work() -> None:
        async with started(1, keys) as service:
            await service.load_adapter("sql", adapter(tmp_path / "a", "one"))
            async with guest(address_of(service), tmp_path / "keys.json") as one:
                await until(lambda: ids(service) == {0, 1})
                readers = read_many(service, 12, "base") + read_many(service, 12, "sql", "sql")
                await until(lambda: all(view.stats.num_running for view in service.replicas()))
                await until(lambda: all(len(reader.tokens[0]) > 20 for reader in readers))
                assert await one.leave() == 0
                assert ids(service) == {0} and [view.replica_id for view in service.replicas()] == [0]
                await check(readers)
                # Nobody is pinged, or remembered, that has gone.
                assert service.guests is not None
                await until(lambda: not service.guests._joined)  # type: ignore[union-attr]

    run(work())


def test_whoever_has_other_keys_is_not_let_in(tmp_path: Path) -> None:
    keys = ClusterKeys.make()

    async def refused(address: str, own: ClusterKeys) -> None:
        """Wait until the orchestrator has turned somebody with these keys away."""
        context = zmq.asyncio.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.IDENTITY, b"join.stranger")
        own.connect(dealer)
        monitor = dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        dealer.connect(address)
        await dealer.send(encode_report(Join(host="elsewhere", attempt=0), 0))
        event = await recv_monitor_message(monitor)
        assert event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH
        dealer.disable_monitor()
        context.destroy(linger=0)

    async def work() -> None:
        async with started(1, keys) as service:
            other = ClusterKeys.make()
            # Who knows the server's public key alone.
            await refused(address_of(service), ClusterKeys(keys.server_public, "", *_pair(other)))
            assert ids(service) == {0} and len(service.replicas()) == 1

    run(work())


def _pair(keys: ClusterKeys) -> tuple[str, str]:
    return keys.worker_public, keys.worker_secret


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGSTOP])
def test_a_joined_replica_that_dies_or_hangs_joins_again(number: signal.Signals) -> None:
    async def work() -> None:
        async with started(1) as service, guest(address_of(service)):
            await until(lambda: ids(service) == {0, 1})
            readers = read_many(service, 24, "r")
            await until(lambda: all(view.stats.num_running for view in service.replicas()))
            victim = service.replica_pids()[1]
            os.kill(victim, number)
            await check(readers)
            await until(lambda: service.replica_pids().get(1) != victim)
            if number is signal.SIGSTOP:
                # It wakes up, and is told that others have its requests.
                os.kill(victim, signal.SIGCONT)
            await until(lambda: ids(service) == {0, 1})
            await check(read_many(service, 8, "again"))

    run(work())


def test_a_server_can_be_made_of_replicas_that_join_alone() -> None:
    async def work() -> None:
        async with started(0) as service, guest(address_of(service)):
            await until(lambda: ids(service) == {0})
            await check(read_many(service, 4, "r"))
            assert service.is_healthy

    run(work())


def test_replicas_end_with_the_server_that_they_joined() -> None:
    async def work() -> None:
        async with started(0) as service:
            one = Guest(address_of(service))
            await until(lambda: ids(service) == {0})
        assert await one.task == 0

    run(work())


def test_a_replica_that_dies_again_and_again_is_given_up_and_that_is_told() -> None:
    async def work() -> None:
        invitation = Invitation(LOOPBACK, ENGINE, f"{FACTORY}_failing")
        service = EngineService(PlainLauncher(ENGINE), OrchestratorOptions(), num_replicas=0, invitation=invitation)
        starting = asyncio.create_task(service.start())
        restart = RestartPolicy(first=0.01, longest=0.02, max_failures=2)
        settings = JoinSettings(address_of(service), None, {}, "plain", restart=restart, log_level="critical")
        try:
            assert await join(settings, asyncio.Event()) == 1
        finally:
            await service.stop()
            starting.cancel()

    run(work())


def test_whoever_leaves_a_server_that_is_gone_does_not_wait_for_it() -> None:
    async def work() -> None:
        stop = asyncio.Event()
        async with started(0) as service:
            settings = JoinSettings(
                address_of(service), None, {"num_threads": 1}, "plain", silence=0.5, log_level="critical"
            )
            task = asyncio.create_task(join(settings, stop))
            await until(lambda: ids(service) == {0})
            assert service.guests is not None
            # From now on nothing that is said arrives anywhere, as if the machine were gone.
            service.guests.close()
            stop.set()
            assert await task == 0

    run(work())


@pytest.mark.slow
@pytest.mark.parametrize("directions", ["down", "both", "up"])
def test_a_link_that_is_cut_and_healed(directions: str) -> None:
    """``up`` is what the replica says, ``down`` what it is told."""

    async def work() -> None:
        async with relayed() as (service, relay):
            readers = read_many(service, 24, "r")
            await until(lambda: all(view.stats.num_running for view in service.replicas()))
            relay.cut(*{"both": (relay.up, relay.down), "up": (relay.up,), "down": (relay.down,)}[directions])
            # Also those that are sent to it before the silence is noticed.
            readers += read_many(service, 12, "later")
            await check(readers)
            # However long the cut lasts: one that is heard and hears nothing is no replica that starts.
            await until(lambda: [view.replica_id for view in service.replicas()] == [0])
            relay.heal()
            await until(lambda: len(ids(service)) == 2)
            await check(read_many(service, 12, "healed"))
            # Nobody else is left of those that were cut off.
            assert len(service.replicas()) == 2

    run(work())


def test_whoever_asks_and_hears_no_answer_is_no_replica_yet() -> None:
    async def work() -> None:
        async with relayed() as (service, relay):
            relay.cut(relay.down)
            os.kill(service.replica_pids()[1], signal.SIGKILL)
            # What ended there is over as soon as another attempt is heard of, and nothing is in its place.
            await until(lambda: [view.replica_id for view in service.replicas()] == [0])
            relay.heal()
            await until(lambda: len(ids(service)) == 2)
            await check(read_many(service, 12, "healed"))

    run(work())


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("tcp://0.0.0.0:0", "--cluster-key"),
        ("ipc:///tmp/x", "tcp://127.0.0.1:5600"),
        ("tcp://127.0.0.1:99999", "no address"),
        ("tcp://127.999.0.1:0", "cannot be used"),
    ],
)
def test_addresses_that_cannot_be_listened_on(address: str, words: str) -> None:
    async def work() -> None:
        with pytest.raises(ConfigError, match=words):
            EngineService(PlainLauncher(ENGINE), OrchestratorOptions(), invitation=Invitation(address, ENGINE, FACTORY))

    run(work())


def test_keys_are_read_by_their_owner_alone_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys = ClusterKeys.make()
    keys.write(path)
    assert path.stat().st_mode & 0o777 == 0o600 and ClusterKeys.read(path) == keys
    with pytest.raises(ConfigError, match="never overwritten"):
        keys.write(path)
    mixed = tmp_path / "mixed.json"
    ClusterKeys(keys.server_public, ClusterKeys.make().server_secret, *_pair(keys)).write(mixed)
    for damaged, words in ((mixed, "does not belong"), (tmp_path / "none", "peft-dist keys FILE")):
        with pytest.raises(ConfigError, match=words):
            ClusterKeys.read(damaged)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_on_the_command_line(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    assert model is not None
    command = [sys.executable, "-m", "peft_dist.cli"]
    key = str(tmp_path / "keys.json")
    subprocess.run([*command, "keys", key], check=True)
    port_file = tmp_path / "port"
    address = free_address()
    here = ["--device", "cpu", "--threads", "1"]
    serve = [*command, "serve", str(tmp_path / "model"), *here, "--replicas", "0", "--port", "0"]
    serve += ["--port-file", str(port_file), "--listen", address, "--cluster-key", key]
    worker = [*command, "worker", "--join", address, "--cluster-key", key, *here]
    with subprocess.Popen(serve) as server, subprocess.Popen(worker) as replica:
        try:
            while not port_file.exists():
                assert server.poll() is None and replica.poll() is None
                select.select([], [], [], 0.1)
            body = {"model": "model", "prompt": [5, 6, 7], "max_tokens": 3}
            url = f"http://127.0.0.1:{port_file.read_text().strip()}/v1/completions"
            answer = httpx.post(url, json=body, timeout=100)
            assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3
            replica.terminate()
            assert replica.wait(30) == 0
            server.terminate()
            assert server.wait(30) == 0
        finally:
            replica.kill()
            server.kill()
