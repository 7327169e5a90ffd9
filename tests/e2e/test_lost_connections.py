"""Connections over TCP that are reset and come back at once, with replicas that go on: nothing is lost or doubled."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_dist.core.restarts import RestartPolicy
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.link import Link
from peft_dist.orchestrator.service import EngineService
from peft_dist.worker.launcher import LaunchedReplica, PlainLauncher
from tests.e2e.test_joining import FACTORY, LOOPBACK, check, ids, relayed
from tests.e2e.test_processes import ENGINE, adapter, run
from tests.e2e.test_processes import workers_find_the_fake as workers_find_the_fake
from tests.e2e.test_replicas import SILENCE, all_ready, read_many, until
from tests.relay import Direction, Relay


def _renewals(caplog: pytest.LogCaptureFixture) -> int:
    return caplog.text.count("and it goes on with what it holds")


@pytest.mark.parametrize("direction", ["up", "down"])
def test_connections_that_are_reset_and_come_back_at_once(
    direction: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was under way is lost in this direction, while both sides go on."""

    async def work() -> None:
        async with relayed() as (service, relay):
            path = Path(adapter(tmp_path / "a", "one"))
            await service.load_adapter("sql", str(path))
            # What is read from now on would be something else.
            (path / "adapter_config.json").write_text("bad")
            readers = read_many(service, 16, "r") + read_many(service, 8, "s", "sql")
            await until(lambda: all(view.stats.num_running for view in service.replicas()))
            await until(lambda: all(len(reader.tokens[0]) > 20 for reader in readers))
            lossy: Direction = getattr(relay, direction)
            relay.cut(lossy)
            readers += read_many(service, 12, "later")
            await until(lambda: lossy.held)
            lost = service.replica_pids()[1]
            relay.reset()
            await check(readers)
            # Whoever lost something goes on as another incarnation, in the same process and with its adapters.
            await until(lambda: ids(service) == {0, 1} and service.replicas()[1].serves_all)
            assert service.replica_pids()[1] == lost and _renewals(caplog) == 1
            await check(read_many(service, 6, "again") + read_many(service, 6, "sql", "sql"))

    run(work())


@pytest.mark.slow
def test_a_command_that_is_lost_with_nothing_behind_it_is_missed() -> None:
    async def work() -> None:
        async with relayed() as (service, relay):
            relay.cut(relay.down)
            # One for each replica.
            readers = read_many(service, 2, "r")
            await until(lambda: relay.down.held)
            relay.reset()
            await check(readers)

    run(work())


class RelayedLauncher(PlainLauncher):
    """Its replicas reach the service by a relay, as those of other nodes do by a network."""

    relay: Relay

    async def start(self, endpoint: str, replica_id: int, epoch: int) -> LaunchedReplica:
        return await super().start(self.relay.address, replica_id, epoch)


def test_a_lost_command_to_a_replica_that_this_server_starts_elsewhere_is_missed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        launcher = RelayedLauncher(
            ENGINE, replica_factory=FACTORY, log_level="critical", heartbeat_seconds=SILENCE / 5, num_replicas=2
        )
        link = Link.listening(LOOPBACK, None)
        options = OrchestratorOptions(
            max_num_seqs=64, seed=1, heartbeat_timeout=SILENCE, restart=RestartPolicy(first=0.01, longest=0.1)
        )
        async with Relay(link.endpoint) as launcher.relay:
            service = EngineService(launcher, options, num_replicas=2, stop_grace=2.0, link=link)
            try:
                await service.start()
                lost = service.replica_pids()
                launcher.relay.cut(launcher.relay.down)
                readers = read_many(service, 2, "r")
                await until(lambda: launcher.relay.down.held)
                launcher.relay.reset()
                await check(readers)
                await until(lambda: all_ready(service))
                assert service.replica_pids() == lost and _renewals(caplog) == 2
                assert all(view.num_restarts == 0 for view in service.replicas())
            finally:
                await service.stop()

    run(work())
