"""Launches that are recorded, and processes that are found by the record, waited for and ended."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.worker.launcher import AccelerateLauncher, PlainLauncher
from peft_dist.worker.state_folder import StateFolder, UnusableFolderError, default_path
from peft_dist.worker.status import tell_status
from peft_dist.worker.survivors import Launch, find_survivors, record, started_at

LAUNCH: Launch = {"protocol": 5, "worker": {"engine": {"model": "m", "depth": None}}}


@contextmanager
def sleeping(state: StateFolder, replica_id: int, launch: Launch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that leads a group, and is recorded as a replica's."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        state.of_replica(replica_id).mkdir()
        record(state.of_replica(replica_id), process.pid, launch)
        try:
            yield process
        finally:
            process.kill()


def test_what_fits_is_kept_and_can_be_waited_for(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")

    async def work(first: subprocess.Popen[bytes], second: subprocess.Popen[bytes]) -> None:
        found = await find_survivors(state, {0: LAUNCH, 1: LAUNCH})
        assert [(i, one.pid) for i, one in found.items()] == [(0, first.pid), (1, second.pid)]
        tell_status(state.of_replica(0), 4)
        found[0].kill()
        assert await found[0].wait() == 4 and state.replicas() == [1]
        await found[1].stop(0.0)
        await found[1].stop(0.0)
        found[1].kill()
        assert await found[1].wait() is None and state.replicas() == []

    with sleeping(state, 0, LAUNCH) as first, sleeping(state, 1, LAUNCH) as second:
        asyncio.run(work(first, second))
    state.close()


def test_what_does_not_fit_is_ended_and_why_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = StateFolder(tmp_path / "state")
    other = {"protocol": 6, "worker": {"engine": {"model": "other", "depth": None}}, "more": 1}
    with sleeping(state, 0, other) as first, sleeping(state, 3, LAUNCH) as second:
        assert asyncio.run(find_survivors(state, {0: LAUNCH})) == {}
        assert first.wait(60) and second.wait(60) and state.replicas() == []
    words = " ".join(caplog.messages)
    for part in ("protocol was 6 and is 5", "worker.engine.model was 'other' and is 'm'", "more was 1 and is None"):
        assert part in words
    assert "replica 3 of the last life is ended, not adopted: fewer replicas" in words
    state.close()


def test_another_process_of_the_same_number_is_left_alone(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")
    with sleeping(state, 0, LAUNCH) as stranger:
        path = state.of_replica(0) / "process.json"
        known = msgspec.json.decode(path.read_bytes())
        assert known["started"] == started_at(stranger.pid) != started_at(1)
        path.write_bytes(msgspec.json.encode(known | {"started": "before"}))
        assert asyncio.run(find_survivors(state, {0: LAUNCH})) == {}
        assert stranger.poll() is None and state.replicas() == []
    state.of_replica(1).mkdir()
    (state.of_replica(1) / "process.json").write_text("{")
    assert asyncio.run(find_survivors(state, {1: LAUNCH})) == {} and state.replicas() == []
    assert started_at(stranger.pid) is None
    state.close()


def test_a_launch_is_the_same_whenever_it_is_asked_for_and_tells_what_matters(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")

    def launch(kind: type[PlainLauncher] = AccelerateLauncher, replica_id: int = 0, **options: object) -> Launch:
        further = {"orphan_timeout": options.pop("orphan_timeout", 60.0)}
        log_level = str(options.pop("log_level", "info"))
        engine = EngineConfig(model="m", device="cpu", num_threads=2, **options)  # type: ignore[arg-type]
        return kind(engine, state=state, further=further, log_level=log_level).launch(replica_id)

    first = launch()
    assert first == launch() and first == msgspec.json.decode(msgspec.json.encode(first))
    # What the orchestrator alone goes by, and what is logged.
    assert first == launch(pinned_adapters=("a",)) == launch(log_level="debug")
    for other in (launch(PlainLauncher), launch(max_num_seqs=3), launch(orphan_timeout=1.0), launch(replica_id=1)):
        assert other != first
    state.close()


def test_a_folder_is_one_servers_and_one_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateFolder(tmp_path / "deep" / "state")
    with pytest.raises(ConfigError, match=r"in use by another server \(process \d+\): stop that one"):
        StateFolder(tmp_path / "deep" / "state")
    state.close()
    StateFolder(tmp_path / "deep" / "state").close()
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(UnusableFolderError, match="chmod 700"):
        StateFolder(tmp_path / "open")
    with pytest.raises(UnusableFolderError, match="too long"):
        StateFolder(tmp_path / ("x" * 100))
    (tmp_path / "file").touch()
    with pytest.raises(UnusableFolderError, match="cannot be used"):
        StateFolder(tmp_path / "file")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_path(8000) == Path("/run/user/7/peft-dist/8000") and default_path(0) is None
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    named = default_path(8000)
    assert named is not None and named.parts[-1] == "8000" and "peft-dist-" in named.parts[-2]
