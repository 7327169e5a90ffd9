"""Orchestrator and worker as real processes over real sockets, around a fake replica."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import AdapterError, EngineDeadError, InvalidRequestError, QueueFullError, UnknownModelError
from peft_dist.core.messages import SequenceProgress
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.service import EngineService
from peft_dist.worker.launcher import AccelerateLauncher, PlainLauncher
from tests.worker.fake_replica import CRASH, FAIL, HOLD, NUM_BLOCKS, REFUSE, expected_token

ROOT = Path(__file__).parents[2]
ENGINE = EngineConfig(model="org/fake", device="cpu", num_threads=1)
LONG = SamplingParams(max_tokens=400)

ORPHAN_MAKER = """
import asyncio, sys
from peft_dist.worker import launcher
from tests.e2e.test_processes import HOLD, LONG, started

async def main():
    async with started(kind=getattr(launcher, sys.argv[1])) as service:
        stream = service.generate("r", [HOLD], LONG, None)
        await anext(stream)
        print(service.replica_pids()[0], flush=True)
        await anext(stream)

asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def workers_find_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


@asynccontextmanager
async def started(
    factory: str = "build", kind: type[PlainLauncher] = PlainLauncher, start_timeout: float | None = None
) -> AsyncIterator[EngineService]:
    launcher = kind(ENGINE, replica_factory=f"tests.worker.fake_replica:{factory}", log_level="critical")
    options = OrchestratorOptions(max_num_seqs=4, max_queue=4, seed=1)
    service = EngineService(launcher, options, start_timeout=start_timeout, stop_grace=2.0)
    try:
        await service.start()
        yield service
    finally:
        await service.stop()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 200))


def ended(pid: int, seconds: float = 60.0) -> bool:
    """Wait, at most so long, until a process that need not be our child has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


async def collect(
    service: EngineService, request_id: str, prompt: list[int], params: SamplingParams, model: str | None = None
) -> dict[int, list[SequenceProgress]]:
    found: dict[int, list[SequenceProgress]] = {}
    async for index, progress in service.generate(request_id, prompt, params, model):
        found.setdefault(index, []).append(progress)
    return found


def adapter(folder: Path, text: str) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(text)
    return str(folder)


@pytest.mark.parametrize("kind", [PlainLauncher, AccelerateLauncher])
def test_sequences_stream_back_in_order_and_the_worker_ends_with_the_service(kind: type[PlainLauncher]) -> None:
    async def work() -> None:
        async with started(kind=kind) as service:
            assert service.is_healthy and service.health_error is None and service.model.model == "org/fake"
            pid = service.replica_pids()[0]
            params = [SamplingParams(n=2, max_tokens=20 + i, seed=i) for i in range(4)]
            results = await asyncio.gather(*(collect(service, f"r{p.seed}", [5], p) for p in params))
            for own, result in zip(params, results, strict=True):
                for index in range(2):
                    tokens = [token for progress in result[index] for token in progress.token_ids]
                    assert tokens == [expected_token(own.seed or 0, index, k, "") for k in range(own.max_tokens or 0)]
                    assert [p.finish_reason for p in result[index]][-2:] == [None, "length"]
            assert service.stats().num_free_blocks == NUM_BLOCKS
        assert ended(pid) and not service.is_healthy

    run(work())


def test_a_replica_that_is_stopped_makes_clients_that_give_up_wait_for_room() -> None:
    """Nothing limits its silence: it has one server, which starts no other."""

    async def work() -> None:
        async with started() as service:
            pid = service.replica_pids()[0]
            os.kill(pid, signal.SIGSTOP)
            admitted = 0
            for number in range(50):
                try:
                    stream = service.generate(f"r{number}", [5] * 50, LONG, None)
                except QueueFullError:
                    continue
                admitted += 1
                await stream.aclose()
            os.kill(pid, signal.SIGCONT)
            assert admitted == 8, "what it runs at once, and what may wait"
            while service._core.room.num_held:
                await asyncio.sleep(0.01)
            [progress] = (await collect(service, "next", [5], SamplingParams(max_tokens=1)))[0]
            assert progress.finish_reason == "length"

    run(work())


def test_closing_a_stream_aborts_it_and_the_others_go_on() -> None:
    async def work() -> None:
        async with started() as service:
            held = [service.generate(f"held{i}", [HOLD], LONG, None) for i in range(3)]
            for stream in held:
                await anext(stream)
            await held[0].aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(held[0])
            await collect(service, "next", [5], SamplingParams(max_tokens=1))
            assert service.stats().num_running == 2
            waiting = asyncio.create_task(anext(held[1]))  # type: ignore[arg-type]
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            await collect(service, "another", [5], SamplingParams(max_tokens=1))
            assert service.stats().num_running == 1
            service.abort("held2")
            assert (await anext(held[2]))[1].finish_reason == "abort"
            with pytest.raises(StopAsyncIteration):
                await anext(held[2])

    run(work())


def test_errors_concern_one_request_alone() -> None:
    async def work() -> None:
        async with started() as service:
            held = service.generate("held", [HOLD], LONG, None)
            await anext(held)
            for token, text in ((FAIL, "not finite"), (REFUSE, "refused by the fake")):
                [progress] = (await collect(service, f"bad{token}", [token], LONG))[0]
                assert progress.finish_reason == "error" and text in (progress.error or "")
            with pytest.raises(InvalidRequestError):
                service.generate("bad", [], LONG, None)
            with pytest.raises(UnknownModelError):
                service.generate("bad", [5], LONG, "nobody")
            with pytest.raises(QueueFullError):
                service.generate("bad", [5], SamplingParams(n=8), None)
            assert len((await collect(service, "good", [5], LONG))[0]) == 400
            assert service.is_healthy and service.stats().num_running == 1

    run(work())


def test_adapters_come_and_go_while_requests_run(tmp_path: Path) -> None:
    async def work() -> None:
        async with started() as service:
            first = await service.load_adapter("sql", adapter(tmp_path / "a", "one"))
            held = service.generate("held", [HOLD], SamplingParams(max_tokens=400, seed=9), "fake:sql")
            assert (await anext(held))[1].token_ids == [expected_token(9, 0, 0, first.content_hash)]
            for name, path, problem in (
                ("bad", adapter(tmp_path / "bad", "bad"), "make it good"),
                ("explode", adapter(tmp_path / "explode", "explode"), "MemoryError: no room"),
                ("none", str(tmp_path / "none"), "none"),
                ("sql", str(tmp_path / "a"), "loaded already"),
            ):
                with pytest.raises(AdapterError, match=problem):
                    await service.load_adapter(name, path)
            second = await service.load_adapter("sql", adapter(tmp_path / "b", "two"), replace=True)
            assert [spec.content_hash for spec in service.adapters()] == [second.content_hash]
            await collect(service, "r", [5], SamplingParams(max_tokens=1), "sql")
            assert set(service.stats().resident_adapters) == {first.content_hash, second.content_hash}
            await service.unload_adapter("sql")
            with pytest.raises(UnknownModelError):
                service.generate("late", [5], LONG, "sql")
            await held.aclose()
            await collect(service, "last", [5], SamplingParams(max_tokens=1))
            # They are dropped, and that is told, in the replica's own time.
            while service.stats().resident_adapters:
                await asyncio.sleep(0.01)

    run(work())


def test_an_adapter_outside_of_the_root_is_refused(tmp_path: Path) -> None:
    async def work() -> None:
        inside, outside = tmp_path / "in", tmp_path / "out"
        inside.mkdir()
        adapter(inside / "good", "one")
        adapter(outside, "two")
        (inside / "link").symlink_to(outside)
        async with started() as service:
            for path in ("../out", str(outside), "link"):
                with pytest.raises(AdapterError):
                    await service.load_adapter("bad", path, root=str(inside))
            assert (await service.load_adapter("good", "good", root=str(inside))).name == "good"

    run(work())


@pytest.mark.parametrize("kind", [PlainLauncher, AccelerateLauncher])
def test_a_killed_worker_fails_every_stream(tmp_path: Path, kind: type[PlainLauncher]) -> None:
    async def work() -> None:
        async with started(kind=kind) as service:
            streams = [service.generate(f"r{i}", [HOLD], SamplingParams(n=2, max_tokens=400), None) for i in range(3)]
            for stream in streams:
                await anext(stream)
            os.kill(service.replica_pids()[0], signal.SIGKILL)
            for stream in streams:
                with pytest.raises(EngineDeadError, match="Replica 0 "):
                    async for _ in stream:
                        pass
            assert not service.is_healthy and "Replica 0 " in (service.health_error or "")
            with pytest.raises(EngineDeadError):
                service.generate("next", [5], LONG, None)
            with pytest.raises(EngineDeadError):
                await service.load_adapter("sql", adapter(tmp_path / "a", "one"))

    run(work())


def test_a_step_that_fails_is_reported_in_its_own_words() -> None:
    async def work() -> None:
        async with started() as service:
            held, pid = service.generate("held", [HOLD], LONG, None), service.replica_pids()[0]
            await anext(held)
            with pytest.raises(EngineDeadError, match="RuntimeError: the fake crashed"):
                await collect(service, "crash", [CRASH], LONG)
            with pytest.raises(EngineDeadError, match="the fake crashed"):
                await anext(held)
            assert ended(pid)

    run(work())


def test_a_terminated_worker_ends() -> None:
    async def work() -> None:
        async with started() as service:
            held = service.generate("held", [HOLD], LONG, None)
            await anext(held)
            os.kill(service.replica_pids()[0], signal.SIGTERM)
            with pytest.raises(EngineDeadError, match="status 143"):
                await anext(held)

    run(work())


@pytest.mark.parametrize(
    ("factory", "timeout", "message"),
    [
        ("build_failing", None, "Replica 0: model 'org/fake' cannot be loaded: choose another"),
        ("no_such_factory", None, "no_such_factory"),
        ("build_hanging", 1.0, "not ready in time"),
    ],
)
def test_a_replica_that_cannot_start_says_why(factory: str, timeout: float | None, message: str) -> None:
    async def work() -> None:
        with pytest.raises(EngineDeadError, match=message):
            async with started(factory, start_timeout=timeout):
                pass

    run(work())


def test_draining_lets_streams_finish_and_stopping_fails_the_rest() -> None:
    async def work() -> None:
        async with started() as service:
            short = service.generate("short", [5], LONG, None)
            assert await service.drain(timeout=30.0)
            with pytest.raises(EngineDeadError):
                service.generate("late", [5], LONG, None)
            assert len([progress async for progress in short]) == 400
        async with started() as service:
            held = service.generate("held", [HOLD], LONG, None)
            await anext(held)
            assert not await service.drain(timeout=0.0)
            await service.stop()
            with pytest.raises(EngineDeadError, match="shut down"):
                await anext(held)

    run(work())


@pytest.mark.parametrize(
    ("kind", "is_stopped"),
    [
        ("PlainLauncher", False),
        ("PlainLauncher", True),
        pytest.param("AccelerateLauncher", True, marks=pytest.mark.slow),
    ],
)
def test_a_worker_does_not_outlive_a_killed_orchestrator(kind: str, is_stopped: bool) -> None:
    # Killed, it cannot clean up after itself.
    with tempfile.TemporaryDirectory() as folder:
        maker = subprocess.Popen(
            [sys.executable, "-c", ORPHAN_MAKER, kind],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": folder},
        )
        assert maker.stdout is not None
        with maker.stdout:
            pid = int(maker.stdout.readline())
            if is_stopped:
                os.kill(pid, signal.SIGSTOP)
                while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                    pass
            maker.kill()
            maker.wait()
        try:
            assert ended(pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
