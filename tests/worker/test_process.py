"""The worker's parts that need no orchestrator."""

from __future__ import annotations

import select
import subprocess
import sys
import threading
from pathlib import Path

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
