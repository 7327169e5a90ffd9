"""Nothing of a request outlives it: no task, stream, call, table entry or block, however it ended."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from peft_dist.core.errors import AdapterError, InvalidRequestError, QueueFullError, UnknownModelError
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.service import EngineService
from peft_dist.worker.launcher import PlainLauncher
from tests.e2e.test_processes import ENGINE, ROOT, adapter, collect, run
from tests.e2e.test_replicas import until
from tests.worker.fake_replica import FAIL, HOLD, NUM_BLOCKS, REFUSE

NUM_REQUESTS = 1000
ROOM = 64
KINDS = ("whole", "fail", "refuse", "close", "cancel", "abort", "abort one", "invalid", "unknown", "adapter")


async def settled() -> None:
    """Let tasks that are done take their leave."""
    for _ in range(3):
        await asyncio.sleep(0)


def holdings(service: EngineService) -> dict[str, Any]:
    """All that a request, or a load, may hold on to."""
    table, registry = service._core._requests, service._core.adapters
    return {
        "tasks": asyncio.all_tasks(),
        "streams": len(service._streams),
        "calls": dict(service._promises._loads),
        "idle": service._streams._idle.is_set(),
        "records": dict(table._records),
        "owners": dict(table._owners),
        "backlog": asdict(table.backlog(0)),
        "unplaced": dict(table._unplaced),
        "reloads": dict(service._core._calls._reloads),
        "uses": +registry._uses,
        "loads": dict(registry._loads),
        "names": [spec.name for spec in registry.specs()],
        "events": list(service._core._events),
    }


def num_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Traffic:
    """Clients of every kind, good and bad. ``seen`` counts how their requests ended."""

    def __init__(self, service: EngineService, folders: dict[str, str]) -> None:
        self.service, self.folders = service, folders
        self.seen: Counter[str] = Counter()
        self.slots = asyncio.Semaphore(ROOM // 3)  # At most three sequences each.
        self.chance = random.Random(7)

    async def client(self, number: int) -> None:
        kind = KINDS[number % len(KINDS)]
        params = SamplingParams(n=self.chance.randint(1, 3), max_tokens=self.chance.randint(1, 6))
        model = self.chance.choice([None, "sql", "fake:json"])
        async with self.slots:
            # Others that were given up may not have been taken in yet, and keep their room until then.
            await until(lambda: self.service._core.room.num_held + params.n <= ROOM)
            await self.ask(f"r{number}", kind, params, model)

    async def ask(self, name: str, kind: str, params: SamplingParams, model: str | None) -> None:
        match kind:
            case "whole" | "fail" | "refuse":
                token = {"whole": 5, "fail": FAIL, "refuse": REFUSE}[kind]
                found = await collect(self.service, name, [token], params, model)
                self.seen.update(progress[-1].finish_reason or "" for progress in found.values())
            case "invalid" | "unknown":
                bad = ([], None) if kind == "invalid" else ([5], "nobody")
                with pytest.raises((InvalidRequestError, UnknownModelError)):
                    self.service.generate(name, bad[0], params, bad[1])
                self.seen[kind] += 1
            case "adapter":
                await self.load(name)
            case _:
                await self.leave(name, kind, params, model)

    async def leave(self, name: str, kind: str, params: SamplingParams, model: str | None) -> None:
        """Requests that would wait for ever, given up in the middle."""
        long = SamplingParams(n=params.n, max_tokens=400)
        stream = self.service.generate(name, [HOLD], long, model)
        await anext(stream)
        if kind == "close":
            await stream.aclose()
        elif kind == "cancel":
            reader = asyncio.create_task(self.exhaust(stream))
            await settled()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        else:
            for index in range(params.n) if kind == "abort one" else [None]:
                self.service.abort(name, index)
            await self.exhaust(stream)
        self.seen[kind] += 1

    @staticmethod
    async def exhaust(stream: object) -> None:
        async for _ in stream:  # type: ignore[attr-defined]
            pass

    async def load(self, name: str) -> None:
        """In turn a load that works, one that is refused, and one that nobody waits for any more."""
        turn = self.seen["loads"] % 3
        self.seen["loads"] += 1
        if turn == 0:
            await self.service.load_adapter(name, self.folders["extra"])
            await self.service.unload_adapter(name)
        elif turn == 1:
            with pytest.raises(AdapterError, match="make it good"):
                await self.service.load_adapter(name, self.folders["bad"])
        else:
            load = asyncio.create_task(self.service.load_adapter(name, self.folders["bad"]))
            await settled()
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)


def test_a_thousand_mixed_requests_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    folders = {name: adapter(tmp_path / name, name) for name in ("sql", "json", "extra", "bad")}

    async def work() -> None:
        launcher = PlainLauncher(ENGINE, replica_factory="tests.worker.fake_replica:build", log_level="critical")
        service = EngineService(launcher, OrchestratorOptions(4, ROOM, seed=1), stop_grace=2.0)
        outside = asyncio.all_tasks()
        try:
            await service.start()
            for name in ("sql", "json"):
                await service.load_adapter(name, folders[name])
            await collect(service, "first", [5], SamplingParams(max_tokens=1), "sql")
            resident = service.stats().resident_adapters
            before, files = holdings(service), num_files()
            traffic = Traffic(service, folders)
            full = service.generate("full", [HOLD], SamplingParams(n=ROOM, max_tokens=400), None)
            with pytest.raises(QueueFullError):
                service.generate("too much", [5], SamplingParams(n=5), None)
            await full.aclose()
            # What the replica has not taken in keeps its room.
            await until(lambda: not service._core.room.num_held)
            await asyncio.gather(*(traffic.client(number) for number in range(NUM_REQUESTS)))
            # Loads that nobody waits for are answered all the same, in their own time.
            for number in itertools.count():
                await collect(service, f"last{number}", [5], SamplingParams(max_tokens=1), "sql")
                if not service._promises._loads:
                    break
            await settled()
            after = holdings(service)
            assert after == before
            # A connection that is being made is two files for a moment.
            await until(lambda: num_files() <= files)
            # What was unloaded last is dropped, and told of, in the replica's own time.
            while service.stats().resident_adapters != resident:
                await asyncio.sleep(0.01)
            stats = service.stats()
            assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, NUM_BLOCKS)
            each = NUM_REQUESTS // len(KINDS)
            for kind in ("close", "cancel", "abort", "abort one", "invalid", "unknown", "loads"):
                assert traffic.seen[kind] == each
            assert traffic.seen["length"] >= each and traffic.seen["error"] >= 2 * each
        finally:
            await service.stop()
        await settled()
        assert asyncio.all_tasks() == outside

    run(work())
