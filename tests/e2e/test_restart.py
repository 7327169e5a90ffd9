"""A server that is killed and started again: its workers go on, with their model and their adapters."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.e2e.test_processes import ended
from tests.e2e.test_serve import COMMAND, ROOT, Server, adapter
from tests.ports import free_address
from tests.worker.fake_replica import HOLD

ACCELERATE = ("--launcher", "accelerate")


class Lives:
    """A server's lives, one after another, on one state folder."""

    def __init__(self, folder: Path, *options: str, **environment: str) -> None:
        self.folder, self.options, self.environment = folder, options, environment
        self.servers: list[Server] = []

    def begin(self, *more: str, wait: bool = True) -> Server:
        folder = self.folder / f"life{len(self.servers)}"
        folder.mkdir()
        server = self._start(folder, "--state-dir", str(self.folder / "state"), *self.options, *more)
        self.servers.append(server)
        if wait:
            server.until(server.port_file.exists)
        return server

    def _start(self, folder: Path, *options: str) -> Server:
        return Server(folder, *options, **self.environment)

    def workers(self) -> dict[int, int]:
        """Process id of each launch that is recorded, by replica."""
        found = (self.folder / "state").glob("replica-*/process.json")
        return {int(path.parent.name[8:]): msgspec.json.decode(path.read_bytes())["pid"] for path in found}

    def end(self) -> None:
        for server in self.servers:
            server.process.kill()
            server.process.wait()
        for pid in self.workers().values():
            end_group(pid)


@contextmanager
def lives(folder: Path, *options: str, **environment: str) -> Iterator[Lives]:
    own = Lives(folder, *options, **environment)
    try:
        yield own
    finally:
        own.end()


def end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    assert ended(pid)


def kill(server: Server) -> None:
    server.process.kill()
    server.process.wait()


def running(server: Server) -> float:
    metrics = httpx.get(f"{server.url}/metrics").text
    return sum(map(float, re.findall(r"peft_dist:requests_running\{[^}]*\} (\S+)", metrics)))


def hold(server: Server, model: str, prompt: Sequence[int] = (HOLD,), max_tokens: int = 400) -> Iterator[str]:
    """A stream that has begun, and ends only with the server; yields once, and then nothing when it breaks."""
    body = {"model": model, "prompt": list(prompt), "max_tokens": max_tokens, "stream": True, "return_token_ids": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=100) as stream:
        lines = stream.iter_lines()
        yield next(lines)
        with pytest.raises(httpx.HTTPError):
            list(lines)


def models(server: Server) -> dict[str, dict[str, Any]]:
    return {card["id"]: card for card in httpx.get(f"{server.url}/v1/models").json()["data"]}


def tokens(server: Server, **body: object) -> list[int]:
    answer = server.post("/v1/completions", {"max_tokens": 5, "return_token_ids": True, "seed": 3, **body})
    assert answer.status_code == 200, answer.text
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


@pytest.mark.parametrize(
    "launcher",
    [pytest.param((), id="plain"), pytest.param(ACCELERATE, id="accelerate", marks=pytest.mark.slow)],
)
def test_a_killed_server_finds_its_workers_and_their_adapters_again(launcher: tuple[str, ...], tmp_path: Path) -> None:
    sql, web = adapter(tmp_path / "sql", "two"), adapter(tmp_path / "web", "three")
    with lives(tmp_path, "--adapter", f"sql={sql}", *launcher) as own:
        first = own.begin()
        load = {"lora_name": "web", "lora_path": str(web), "pinned": True}
        assert first.post("/v1/load_lora_adapter", load).status_code == 200
        known, expected = models(first), tokens(first, model="web", prompt=[5])
        workers, stream = own.workers(), hold(first, "sql")
        next(stream)
        kill(first)
        assert list(stream) == []
        # What is read from now on would be something else.
        for folder in (sql, web):
            (folder / "adapter_config.json").write_text("bad")
        second = own.begin()
        assert own.workers() == workers and "outlived the server" in second.log
        again = models(second)
        assert list(again) == list(known) and again["web"]["pinned"] and not again["sql"]["pinned"]
        assert tokens(second, model="web", prompt=[5]) == expected and running(second) == 0
        assert second.post("/v1/unload_lora_adapter", {"lora_name": "web"}).status_code == 200
        kill(second)
        third = own.begin()
        assert own.workers() == workers and list(models(third)) == [name for name in known if name != "web"]
        assert third.stop() == 0
        assert all(ended(pid) for pid in workers.values()) and own.workers() == {}


def test_what_is_missing_is_started_and_brought_the_adapters(tmp_path: Path) -> None:
    sql = adapter(tmp_path / "sql", "two")
    with lives(tmp_path, "--replicas", "2", "--heartbeat-timeout", "5") as own:
        first = own.begin()
        load = {"lora_name": "sql", "lora_path": str(sql)}
        assert first.post("/v1/load_lora_adapter", load).status_code == 200
        before, expected = own.workers(), tokens(first, model="sql", prompt=[5])
        kill(first)
        end_group(before[1])
        second = own.begin()
        # The one that is left serves alone until the other is there.
        assert tokens(second, model="sql", prompt=[5]) == expected
        second.until(lambda: httpx.get(f"{second.url}/ready?replicas=2&warm=true").status_code == 200)
        after = own.workers()
        assert after[0] == before[0] and after[1] != before[1]
        assert [tokens(second, model="sql", prompt=[5]) for _ in range(4)] == [expected] * 4
        kill(second)
        # Fewer are asked for: the threads, and so the launch, are of another kind then.
        third = own.begin("--replicas", "1")
        assert own.workers().keys() == {0} and ended(after[1])
        assert "replica 1 of the last life is ended, not adopted: fewer replicas" in third.log


@pytest.mark.slow
def test_a_drained_replica_stays_drained_after_a_crash_of_the_server(tmp_path: Path) -> None:
    def states(server: Server) -> list[str]:
        return list(httpx.get(f"{server.url}/health").json()["replicas"].values())

    with lives(tmp_path, "--replicas", "2") as own:
        first = own.begin()
        assert first.post("/admin/drain/0", {}).status_code == 200
        before = own.workers()
        kill(first)
        second = own.begin()
        assert own.workers() == before and states(second) == ["drained", "ready"]
        assert "POST /admin/resume/0" in second.log and tokens(second, model="__base__", prompt=[5])
        assert second.post("/admin/resume/0", {}).status_code == 200
        kill(second)
        assert states(own.begin()) == ["ready", "ready"]


@pytest.mark.slow
def test_workers_with_other_options_are_ended_and_others_started(tmp_path: Path) -> None:
    with lives(tmp_path) as own:
        kill(own.begin())
        before = own.workers()
        second = own.begin("--max-num-seqs", "7", "--served-model-name", "other")
        assert "other" in models(second) and own.workers() != before and ended(before[0])
        assert "worker.engine.max_num_seqs was 256 and is 7" in second.log
        kill(second)
        # Another server's process may have the number of one that has ended.
        record = tmp_path / "state" / "replica-0" / "process.json"
        pid = own.workers()[0]
        content = msgspec.json.decode(record.read_bytes())
        with subprocess.Popen(["sleep", "60"], start_new_session=True) as stranger:
            record.write_bytes(msgspec.json.encode(content | {"pid": stranger.pid}))
            third = own.begin("--max-num-seqs", "7", "--served-model-name", "other")
            assert stranger.poll() is None and own.workers()[0] not in (pid, stranger.pid)
            # The one that was not found hears that it is nobody's.
            assert ended(pid) and "is told to end" in third.log
            stranger.kill()


@pytest.mark.slow
def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    with lives(tmp_path) as own:
        first = own.begin()
        second = own.begin(wait=False)
        assert second.process.wait(30) == 1
        assert f"in use by another server (process {first.process.pid})" in second.log
        assert first.stop() == 0


def test_orphans_end_in_time(tmp_path: Path) -> None:
    with lives(tmp_path, "--orphan-timeout", "0.5") as own:
        first = own.begin()
        workers, children = own.workers(), first.children()
        kill(first)
        assert children == list(workers.values()) and ended(workers[0])
        assert "no orchestrator came within 0.5 s" in first.log
        second = own.begin()
        assert own.workers() != workers and tokens(second, model="worker", prompt=[5])


def test_a_worker_that_loads_its_model_is_adopted_when_it_has(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    slow = ["--replica-factory", "tests.worker.fake_replica:build_when_told"]
    with lives(tmp_path, *slow, FAKE_GATE=str(gate)) as own:
        first = own.begin(wait=False)
        first.until(own.workers)
        workers = own.workers()
        kill(first)
        second = own.begin(wait=False)
        # It opens the pipe when the worker has: from then on nothing is known of it but its signs of life.
        with gate.open("wb"):
            pass
        second.until(second.port_file.exists)
        assert own.workers() == workers and tokens(second, model="worker", prompt=[5])


@pytest.mark.slow
def test_a_worker_that_does_not_listen_is_replaced(tmp_path: Path) -> None:
    with lives(tmp_path) as own:
        kill(own.begin())
        workers = own.workers()
        os.kill(workers[0], signal.SIGSTOP)
        second = own.begin()
        assert own.workers() != workers and ended(workers[0]) and tokens(second, model="worker", prompt=[5])


class Guest:
    """``peft-dist worker``, and the process of its replica."""

    def __init__(self, folder: Path, address: str, *options: str) -> None:
        command = [*COMMAND, "worker", "--join", address, "--device", "cpu", "--launcher", "plain", *options]
        self.log_file = folder / "guest.log"
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)

    @property
    def worker(self) -> int | None:
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(found[0]) if found else None


@contextmanager
def guest(folder: Path, address: str, *options: str) -> Iterator[Guest]:
    one = Guest(folder, address, *options)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()


@pytest.mark.slow
def test_a_replica_that_joined_outlives_the_server_and_leaves_the_next_one(tmp_path: Path) -> None:
    sql, address = adapter(tmp_path / "sql", "two"), free_address()
    options = ["--replicas", "0", "--listen", address, "--heartbeat-timeout", "5"]
    with lives(tmp_path, *options) as own, guest(tmp_path, address, "--silence", "3") as one:
        first = own.begin()
        assert first.post("/v1/load_lora_adapter", {"lora_name": "sql", "lora_path": str(sql)}).status_code == 200
        worker, expected = one.worker, tokens(first, model="sql", prompt=[5])
        stream = hold(first, "sql")
        next(stream)
        kill(first)
        assert list(stream) == []
        (sql / "adapter_config.json").write_text("bad")
        second = own.begin()
        assert tokens(second, model="sql", prompt=[5]) == expected and running(second) == 0
        assert one.worker == worker and "goes on from another life" in second.log
        kill(second)
        while "the orchestrator has been silent for 3 s" not in one.log_file.read_text():
            assert one.process.poll() is None
            time.sleep(0.02)
        third = own.begin()
        assert tokens(third, model="sql", prompt=[5]) == expected and one.worker == worker
        one.process.send_signal(signal.SIGTERM)
        assert one.process.wait(30) == 0
        third.until(lambda: httpx.get(f"{third.url}/health").status_code == 503)


@pytest.mark.slow
def test_a_replica_that_joined_with_other_options_joins_anew(tmp_path: Path) -> None:
    address = free_address()
    options = ["--replicas", "0", "--listen", address, "--heartbeat-timeout", "2"]
    with lives(tmp_path, *options) as own, guest(tmp_path, address) as one:
        kill(own.begin())
        worker = one.worker
        second = own.begin("--max-num-seqs", "7")
        assert "is sent away: max_num_seqs was 256 and is 7" in second.log and one.worker not in (None, worker)
        assert tokens(second, model="worker", prompt=[5])


@pytest.mark.slow
def test_a_replica_that_joined_and_waited_in_vain_asks_to_join(tmp_path: Path) -> None:
    address = free_address()
    options = ["--replicas", "0", "--listen", address, "--heartbeat-timeout", "2"]
    with (
        lives(tmp_path, *options) as own,
        guest(tmp_path, address, "--silence", "0.5", "--orphan-timeout", "0.5") as one,
    ):
        kill(own.begin())
        worker = one.worker
        assert worker is not None and ended(worker)
        second = own.begin()
        assert one.worker not in (None, worker) and tokens(second, model="worker", prompt=[5])
