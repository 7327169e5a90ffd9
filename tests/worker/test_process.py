"""The worker's parts that need no orchestrator."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import AdapterError, ConfigError
from peft_dist.core.messages import LoadAdapter
from peft_dist.worker import channel, process
from peft_dist.worker.config import WorkerConfig
from peft_dist.worker.fetcher import AdapterFetcher
from peft_dist.worker.process import EXIT_ORPHANED, check_world, main

CONFIG = WorkerConfig(endpoint="ipc:///nowhere", replica_id=0, epoch=1, engine=EngineConfig(model="m"))


@pytest.mark.parametrize(
    ("asked", "started", "fits"), [(1, None, True), (1, "1", True), (1, "2", False), (2, None, False)]
)
def test_the_world_must_have_the_size_asked_for(
    asked: int, started: str | None, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if started is not None:
        monkeypatch.setenv("WORLD_SIZE", started)
    if fits:
        check_world(asked)
    else:
        with pytest.raises(ConfigError, match=f"{started or 1} processes where {asked}"):
            check_world(asked)


@pytest.mark.parametrize(
    "change", [{"extra": 1}, {"epoch": "1"}, {"engine": {}}, {"engine": {"model": "m", "depth": -1}}]
)
def test_a_configuration_of_another_release_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "worker.json"
    content = msgspec.json.decode(msgspec.json.encode(CONFIG))
    path.write_bytes(msgspec.json.encode({**content, **change}))
    with pytest.raises(ConfigError, match=r"worker\.json"):
        WorkerConfig.read(path)


@pytest.mark.parametrize("factory", ["", "os:", "os:nothing", "no.such.module:build"])
def test_a_factory_that_does_not_exist_is_named(factory: str) -> None:
    with pytest.raises(ConfigError, match="replica_factory"):
        msgspec.structs.replace(CONFIG, replica_factory=factory).load_factory()


def test_finding_wakes_whoever_waits_and_brings_every_error() -> None:
    release = threading.Event()

    def find(command: LoadAdapter) -> Path:
        release.wait()
        if command.name == "bad":
            raise AdapterError("bad: mend it")
        return Path(command.path)

    fetcher = AdapterFetcher(find)
    assert fetcher.take_found() == []
    for call_id, name in enumerate(["good", "bad"]):
        fetcher.start(LoadAdapter(call_id=call_id, name=name, path="/there"))
    assert select.select([fetcher.fileno()], [], [], 0)[0] == []
    release.set()
    found = {}
    while len(found) < 2:
        assert select.select([fetcher.fileno()], [], [], 60)[0]
        found.update({command.name: outcome for command, outcome in fetcher.take_found()})
    assert found["good"] == Path("/there") and str(found["bad"]) == "bad: mend it"


def test_usage() -> None:
    assert main([]) == 2


def test_a_worker_ends_when_its_standard_input_does(tmp_path: Path) -> None:
    CONFIG.write(tmp_path / "worker.json")
    command = [sys.executable, "-m", "peft_dist.worker", str(tmp_path / "worker.json")]
    hanging = msgspec.structs.replace(CONFIG, replica_factory="tests.worker.fake_replica:build_hanging")
    hanging.write(tmp_path / "worker.json")
    with subprocess.Popen(command, stdin=subprocess.PIPE, cwd=Path(__file__).parents[2]) as worker:
        assert worker.stdin is not None
        worker.stdin.close()
        assert worker.wait(timeout=100) == EXIT_ORPHANED


def test_a_rank_that_waits_for_its_device_ends_at_once_when_it_is_told_to(tmp_path: Path) -> None:
    """Torch's launcher tells it so when another rank has failed, and kills it half a minute later."""
    factory = "tests.worker.fake_replica:build_stuck"
    msgspec.structs.replace(CONFIG, replica_factory=factory, world_size=2).write(tmp_path / "worker.json")
    command = [sys.executable, "-m", "peft_dist.worker", str(tmp_path / "worker.json")]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], env=environment
    ) as worker:
        try:
            assert worker.stdout is not None and worker.stdout.readline() == b"stuck\n"
            worker.terminate()
            assert worker.wait(timeout=60) == -signal.SIGTERM
        finally:
            worker.kill()


@pytest.mark.parametrize("is_built", [False, True])
def test_a_rank_that_fails_while_others_wait_for_it_does_not_keep_them_waiting(
    is_built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error")

    replica = SimpleNamespace(follow=fail)
    monkeypatch.setattr(process, "_build", (lambda config: replica) if is_built else fail)
    monkeypatch.setattr(process, "_await_end", lambda seconds: waits.append(seconds) or 1)
    assert process.run_rank(CONFIG) == 1
    # Where all fail of the same at the start, rank 0 has to be heard.
    [seconds] = waits
    assert seconds == (process._FELLOWS_SECONDS if is_built else 2 * process._LAST_WORDS_MS / 1000)


def test_why_it_cannot_go_on_is_logged_where_nobody_hears_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (process, channel):
        monkeypatch.setattr(module, "_LAST_WORDS_MS", 50)
    config = msgspec.structs.replace(
        CONFIG, endpoint=f"ipc://{tmp_path}/nobody", replica_factory="tests.worker.fake_replica:build_failing"
    )
    assert process.run_worker(config, lambda: None) == 1
    told = "replica 0 cannot go on, and nobody has heard why: model 'm' cannot be loaded: choose another"
    assert caplog.messages == [told]
