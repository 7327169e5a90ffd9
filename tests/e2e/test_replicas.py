"""Two replicas in processes of their own, around fake engines: what dies, hangs, is poisoned or drained."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from peft_dist.core.errors import EngineDeadError, ReplicaStateError, UnknownReplicaError
from peft_dist.core.messages import SequenceProgress
from peft_dist.core.restarts import RestartPolicy
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.service import EngineService
from peft_dist.orchestrator.streams import Stream
from peft_dist.placement.triggers import TriggerSettings
from peft_dist.worker.launcher import AccelerateLauncher, PlainLauncher
from tests.e2e.test_processes import ENGINE, ROOT, adapter, run
from tests.worker.fake_replica import CRASH, HOLD, SLOW, expected_token

NUM_TOKENS = 200
# What may keep a replica from its heartbeats on a busy machine takes less.
SILENCE = 3.0


@pytest.fixture(autouse=True)
def workers_find_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


@asynccontextmanager
async def started(
    kind: type[PlainLauncher] = PlainLauncher,
    restarts: bool = True,
    triggers: TriggerSettings | None = None,
    seats: int = 64,
) -> AsyncIterator[EngineService]:
    launcher = kind(
        ENGINE,
        replica_factory="tests.worker.fake_replica:build",
        log_level="critical",
        heartbeat_seconds=SILENCE / 5,
        num_replicas=2,
    )
    restart = RestartPolicy(first=0.01, longest=0.1) if restarts else None
    options = OrchestratorOptions(
        max_num_seqs=seats,
        max_queue=64,
        seed=1,
        heartbeat_timeout=SILENCE,
        step_timeout=30.0,
        restart=restart,
        triggers=triggers or TriggerSettings(),
    )
    service = EngineService(launcher, options, num_replicas=2, stop_grace=2.0)
    try:
        await service.start()
        yield service
    finally:
        await service.stop()


async def until(condition: Callable[[], object]) -> None:
    """That another process is ready, or gone, is told to the service alone."""
    while not condition():
        await asyncio.sleep(0.01)


def all_ready(service: EngineService) -> bool:
    return len(service.replica_pids()) == 2


class Reader:
    """Collects a stream, and checks that no token is missing or doubled."""

    def __init__(
        self, service: EngineService, request_id: str, params: SamplingParams, model: str | None = None
    ) -> None:
        self.params = params
        spec = service.resolve(model)
        self.content = spec.content_hash if spec else ""
        self.tokens: dict[int, list[int]] = {index: [] for index in range(params.n)}
        self.last: dict[int, SequenceProgress] = {}
        self.stream: Stream = service.generate(request_id, [SLOW], params, model)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for index, progress in self.stream:
            assert progress.first_index == len(self.tokens[index])
            self.tokens[index] += progress.token_ids
            self.last[index] = progress

    async def check(self) -> None:
        await self.task
        for index, tokens in self.tokens.items():
            seed = self.params.seed or 0
            expected = [expected_token(seed, index, k, self.content) for k in range(self.params.max_tokens or 0)]
            assert tokens == expected
            assert self.last[index].finish_reason == "length"


def read_many(
    service: EngineService, number: int, prefix: str, model: str | None = None, num_tokens: int = NUM_TOKENS
) -> list[Reader]:
    return [
        Reader(service, f"{prefix}{i}", SamplingParams(n=1 + i % 2, max_tokens=num_tokens, seed=i + 1), model)
        for i in range(number)
    ]


def busiest(service: EngineService) -> int:
    return max(service.replicas(), key=lambda view: view.stats.num_running).replica_id


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (PlainLauncher, signal.SIGSTOP),
        (AccelerateLauncher, signal.SIGKILL),
        pytest.param(PlainLauncher, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(AccelerateLauncher, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_streams_go_on_when_a_replica_dies_or_hangs(
    kind: type[PlainLauncher], number: signal.Signals, tmp_path: Path
) -> None:
    async def work() -> None:
        async with started(kind) as service:
            await service.load_adapter("sql", adapter(tmp_path / "a", "one"))
            readers = read_many(service, 12, "base") + read_many(service, 12, "sql", "sql")
            await until(lambda: all(len(reader.tokens[0]) > 20 for reader in readers))
            assert all(view.stats.num_running for view in service.replicas()), "both have work"
            victim = busiest(service)
            os.kill(service.replica_pids()[victim], number)
            for reader in readers:
                await reader.check()
            await until(lambda: all_ready(service))
            [lost] = [view for view in service.replicas() if view.replica_id == victim]
            assert lost.num_restarts == 1 and service.is_healthy
            # It has the adapter again, and serves it.
            await until(lambda: service.replicas()[victim].stats.resident_adapters)
            again = read_many(service, 8, "again", "sql")
            await until(lambda: service.replicas()[victim].stats.num_running)
            for reader in again:
                await reader.check()

    run(work())


def test_requests_move_to_a_replica_that_comes_and_outlive_it(tmp_path: Path) -> None:
    async def work() -> None:
        async with started(triggers=TriggerSettings(period=0.2, pause=0.1), seats=8) as service:
            await service.load_adapter("sql", adapter(tmp_path / "a", "one"))
            await service.drain_replica(1)
            # Long enough for a plan on a busy machine; the fake takes 500.
            long = 480
            readers = read_many(service, 8, "base", None, long) + read_many(service, 8, "sql", "sql", long)
            await until(lambda: all(reader.tokens[0] for reader in readers))
            service.resume_replica(1)
            await until(lambda: moves(service) and service.replicas()[1].stats.num_running)
            os.kill(service.replica_pids()[1], signal.SIGKILL)
            for reader in readers:
                await reader.check()

    def moves(service: EngineService) -> int:
        view = service.migration()
        return sum(view.moves.values()) if view is not None else 0

    run(work())


def test_what_is_due_once_a_replica_is_resumed_is_not_late() -> None:
    """Until then nothing is due but the end of somebody's silence: nobody waits for that to see what could move."""

    async def work() -> None:
        async with started() as service:
            await service.drain_replica(1)
            timer, core = service._timer, service._core
            await until(lambda: timer.is_armed and timer._when > core.migration._check_at)
            service.resume_replica(1)
            assert timer.is_armed and timer._when <= core.next_deadline() == core.migration._check_at

    run(work())


def test_whether_a_replica_is_drained_outlives_the_server_once_that_is_answered() -> None:
    async def work() -> None:
        async with started() as service:
            replica = service._core.replicas[1]
            await service.drain_replica(1)
            assert replica.num_drains_kept == replica.num_drains_told == 1
            service.resume_replica(1)
            await service.drain_kept(1)
            assert replica.num_drains_kept == replica.num_drains_told == 2
            # One that is stopped may never say so, and its end is waited for no longer.
            os.kill(service.replica_pids()[1], signal.SIGSTOP)
            drained = asyncio.create_task(service.drain_replica(1))
            await until(lambda: replica.num_drains_told == 3)
            os.kill(replica.pid or 0, signal.SIGKILL)
            with pytest.raises(ReplicaStateError, match="it is started again, and stays drained until POST"):
                await drained
            assert replica.num_drains_kept == 2

    run(work())


def test_a_drain_of_a_replica_that_dies_says_so_and_holds() -> None:
    async def work() -> None:
        async with started() as service:
            held = service.generate("held", [HOLD], SamplingParams(max_tokens=400), None)
            await anext(held)
            [record] = service._core._requests.records()
            number = record.replica_id
            assert number is not None
            os.kill(service.replica_pids()[number], signal.SIGSTOP)
            # It is to tell what it has of this, and cannot: so it is not empty.
            service.move_request("held", 1 - number, with_kv=True)
            drain = asyncio.create_task(service.drain_replica(number))
            await until(lambda: service.replicas()[number].state == "draining")
            os.kill(service._core.replicas[number].pid or 0, signal.SIGKILL)
            with pytest.raises(
                ReplicaStateError, match=f"replica {number} was lost as it drained .*, and stays drained"
            ):
                await drain
            await until(lambda: service.replicas()[number].state == "drained")
            service.resume_replica(number)
            assert all_ready(service)
            await held.aclose()

    run(work())


def test_a_request_that_two_replicas_die_of_is_failed_alone() -> None:
    async def work() -> None:
        async with started() as service:
            held = service.generate("held", [HOLD], SamplingParams(max_tokens=400), None)
            await anext(held)
            readers = read_many(service, 6, "r")
            await until(lambda: all(len(reader.tokens[0]) > 20 for reader in readers))
            poison = service.generate("poison", [CRASH], SamplingParams(max_tokens=4), None)
            with pytest.raises(EngineDeadError, match=r"the fake crashed\. .*not tried again"):
                await anext(poison)
            for reader in readers:
                await reader.check()
            await until(lambda: all_ready(service))
            assert [view.num_restarts for view in service.replicas()] == [1, 1]
            service.abort("held")
            assert (await anext(held))[1].finish_reason == "abort"

    run(work())


def test_without_restarts_the_last_replica_takes_everything_with_it() -> None:
    async def work() -> None:
        async with started(restarts=False) as service:
            reader = Reader(service, "r", SamplingParams(max_tokens=480, seed=1))
            await until(lambda: len(reader.tokens[0]) > 20)
            for replica_id in (0, 1):
                os.kill(service.replica_pids()[replica_id], signal.SIGKILL)
                await until(lambda gone=replica_id: gone not in service.replica_pids())
            with pytest.raises(EngineDeadError, match=r"Replica [01] "):
                await reader.task
            assert not service.is_healthy
            with pytest.raises(EngineDeadError):
                service.generate("next", [5], SamplingParams(), None)

    run(work())


def test_while_no_replica_is_there_what_runs_waits_and_nothing_new_is_taken() -> None:
    async def work() -> None:
        async with started() as service:
            readers = read_many(service, 8, "r")
            await until(lambda: all(len(reader.tokens[0]) > 20 for reader in readers))
            for pid in service.replica_pids().values():
                os.kill(pid, signal.SIGKILL)
            await until(lambda: not service.replica_pids())
            assert not service.is_healthy
            with pytest.raises(EngineDeadError):
                service.generate("next", [5], SamplingParams(), None)
            for reader in readers:
                await reader.check()

    run(work())


@pytest.mark.parametrize("dies", [None, "source", "target"])
def test_streams_move_back_and_forth_with_their_kv(dies: str | None, tmp_path: Path) -> None:
    async def work() -> None:
        async with started() as service:
            await service.load_adapter("sql", adapter(tmp_path / "a", "one"))
            readers = read_many(service, 6, "base") + read_many(service, 6, "sql", "sql")
            handover, moves = service._core.handover, 0
            while not all(reader.task.done() for reader in readers):
                await until(lambda: handover.next_deadline() == float("inf"))
                source = moves % 2
                for record in service._core._requests.on_replica(source):
                    service.move_request(record.request_id, 1 - source, with_kv=True)
                moves += 1
                if dies is not None and moves == 5:
                    os.kill(service.replica_pids()[source if dies == "source" else 1 - source], signal.SIGKILL)
                    await until(lambda: len(service.replica_pids()) < 2)
                    await until(lambda: all_ready(service))
                await asyncio.sleep(0.01)
            for reader in readers:
                await reader.check()
            assert handover.num_with_kv > 20 and not handover.num_recomputed
            assert dies or not handover.num_failed

    run(work())


@pytest.mark.parametrize("restart", [False, True])
def test_draining_moves_what_runs(restart: bool, tmp_path: Path) -> None:
    async def work() -> None:
        async with started() as service:
            await service.load_adapter("sql", adapter(tmp_path / "a", "one"))
            pids = service.replica_pids()
            readers = read_many(service, 12, "base") + read_many(service, 12, "sql", "sql")
            await until(lambda: all(len(reader.tokens[0]) > 20 for reader in readers))
            await service.drain_replica(0, restart=restart)
            assert not any(reader.task.done() for reader in readers), "it does not wait for their ends"
            assert service.is_healthy and 0 not in service.replica_pids()
            if restart:
                await until(lambda: all_ready(service))
                assert service.replica_pids()[0] != pids[0]
            else:
                with pytest.raises(ReplicaStateError, match="the only one"):
                    await service.drain_replica(1)
                service.resume_replica(0)
                assert service.replica_pids() == pids
            for reader in readers:
                await reader.check()
            with pytest.raises(UnknownReplicaError, match="0, 1"):
                await service.drain_replica(7)
            with pytest.raises(ReplicaStateError):
                service.resume_replica(1)

    run(work())
