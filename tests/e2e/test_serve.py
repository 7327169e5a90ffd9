"""The ``peft-dist`` command from its options to its exit status, around a fake replica."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.worker.fake_replica import HOLD, SLOW

ROOT = Path(__file__).parents[2]
# A folder without a tokenizer: importing transformers would take most of the time of these tests.
MODEL = ROOT / "tests" / "worker"
COMMAND = [sys.executable, "-m", "peft_dist.cli"]
FAKE = ["--launcher", "plain", "--replica-factory", "tests.worker.fake_replica:build", "--device", "cpu"]


def children(process: int) -> list[int]:
    """None of one that has just ended, and none of its threads that has."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{process}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, file.read_text().split())
    return found


def is_replica(pid: int) -> bool:
    """Whether it is one by now, and still: not a process that plans, that is just being started, or that has ended."""
    try:
        return b"peft_dist.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


class Server:
    def __init__(self, folder: Path, *options: str, **environment: str) -> None:
        self._start(folder, MODEL, [*FAKE, *options], {**os.environ, **environment})

    def _start(self, folder: Path, model: Path, options: Sequence[str], environment: Mapping[str, str]) -> None:
        """``folder``: Where the port and the log are written."""
        self.port_file, self.log_file = folder / "port", folder / "log"
        command = [*COMMAND, "serve", str(model), "--port", "0", "--port-file", str(self.port_file), *options]
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=dict(environment)
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{int(self.port_file.read_text())}"

    def until(self, condition: Callable[[], object]) -> None:
        """What another process does, and tells by a file, is no event that can be waited for."""
        while not condition():
            assert self.process.poll() is None, self.log
            time.sleep(0.02)

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def children(self) -> list[int]:
        """Processes of the replicas: not those that plan for them."""
        return [pid for pid in children(self.process.pid) if is_replica(pid)]

    def post(self, path: str, body: dict[str, object], key: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.post(f"{self.url}{path}", json=body, headers=headers, timeout=100)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=100)


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    server = Server(folder, *options, **environment)
    try:
        server.until(server.port_file.exists)
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def adapter(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(text)
    return folder


def events(response: httpx.Response) -> Iterator[dict[str, object]]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_it_serves_adapters_behind_keys_and_never_tells_the_keys(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    adapter(folder / "json", "one")
    adapter(folder / "broken", "bad")
    (folder / "bare").mkdir()
    (folder / "bare" / "adapter_model.safetensors").touch()
    sql = adapter(tmp_path / "sql", "two")
    adapter(folder / "sql", "of the same name, which counts for less")
    options = ["--adapter", f"sql={sql}", "--adapter-dir", str(folder), "--served-model-name", "tiny"]
    with serving(
        tmp_path, *options, PEFT_DIST_API_KEY="key-of-anna key-of-ben", PEFT_DIST_ADMIN_KEY="key-of-boss"
    ) as server:
        body = {"model": "tiny:sql", "prompt": [5, 6], "max_tokens": 3}
        assert server.post("/v1/completions", body).status_code == 401
        answer = server.post("/v1/completions", body, "key-of-ben")
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3
        models = httpx.get(f"{server.url}/v1/models", headers={"Authorization": "Bearer key-of-anna"}).json()["data"]
        assert [model["id"] for model in models] == ["tiny", "sql", "json"]
        assert models[1]["root"] == str(sql)
        assert httpx.get(f"{server.url}/health").json()["not_served"] == ["bare", "broken"]
        (folder / "broken" / "adapter_config.json").write_text("whole")
        mended = {"lora_name": "broken", "lora_path": "broken"}
        assert server.post("/v1/load_lora_adapter", mended, "key-of-boss").status_code == 200
        assert httpx.get(f"{server.url}/health").json()["not_served"] == ["bare"]
        load = {"lora_name": "json2", "lora_path": "json"}
        assert server.post("/v1/load_lora_adapter", load, "key-of-ben").status_code in (401, 403)
        assert server.post("/v1/load_lora_adapter", load, "key-of-boss").status_code == 200
        outside = {"lora_name": "out", "lora_path": str(sql)}
        assert server.post("/v1/load_lora_adapter", outside, "key-of-boss").status_code == 400
        worker = Path(f"/proc/{server.children()[0]}/environ").read_bytes()
        assert server.stop() == 0
        assert "broken" in server.log and "sql (rank 8)" in server.log
        assert "bare has no adapter_config.json beside adapter_model.safetensors" in server.log
        for key in ("key-of-anna", "key-of-ben", "key-of-boss"):
            assert not re.search(rf"\b{key}\b", server.log) and key.encode() not in worker


def test_a_pin_lasts_from_the_start_to_the_unload(tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    for name in ("json", "other"):
        adapter(folder / name, name)
    sql = adapter(tmp_path / "sql", "one")
    with serving(tmp_path, "--adapter", f"sql={sql}", "--adapter-dir", str(folder), "--pin-adapter", "sql") as server:

        def pinned() -> list[str]:
            cards = httpx.get(f"{server.url}/v1/models").json()["data"]
            return [card["id"] for card in cards if card.get("pinned")]

        def load(name: str, **options: object) -> httpx.Response:
            return server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": "other", **options})

        assert pinned() == ["sql"]
        # The fake takes one pin.
        refused = load("second", pinned=True)
        assert refused.status_code == 400 and "cannot be pinned: unpin one" in refused.json()["error"]["message"]
        assert load("sql", load_inplace=True).status_code == 200 and pinned() == ["sql"]
        assert load("json", load_inplace=True, pinned=True).status_code == 200, "the same content is pinned already"
        assert load("json", load_inplace=True, pinned=False).status_code == 200 and pinned() == ["sql"]
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "sql"}).status_code == 200 and pinned() == []
        assert load("json", load_inplace=True, pinned=True).status_code == 200 and pinned() == ["json"]
        assert "peft_dist:adapters_pinned 1.0" in httpx.get(f"{server.url}/metrics").text


def test_keys_of_the_options_and_of_the_environment_count_together(tmp_path: Path) -> None:
    keys = {"PEFT_DIST_API_KEY": "env-one env-two", "PEFT_DIST_ADMIN_KEY": "env-admin"}
    with serving(tmp_path, "--api-key", "cli", "--admin-key", "cli-admin", **keys) as server:
        body, load = {"model": "worker", "prompt": [5], "max_tokens": 1}, {"lora_name": "x", "lora_path": "/nowhere"}
        for key, status in (("cli", 200), ("env-one", 200), ("env-two", 200), ("env-one env-two", 401), ("other", 401)):
            assert server.post("/v1/completions", body, key).status_code == status, key
        # There is one admin key: the option goes before the variable.
        assert server.post("/v1/load_lora_adapter", load, "cli-admin").json()["error"]["code"] == "adapter_refused"
        assert server.post("/v1/load_lora_adapter", load, "env-admin").status_code == 401


def test_a_stream_that_can_finish_does_so_after_sigterm(tmp_path: Path) -> None:
    body = {"model": "worker", "prompt": [5], "max_tokens": 400, "stream": True, "return_token_ids": True}
    with serving(tmp_path) as server, httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        found = events(response)
        next(found)
        server.process.send_signal(signal.SIGTERM)
        last = list(found)[-1]
        assert last["choices"][0]["finish_reason"] == "length"  # type: ignore[index]
        assert server.process.wait(timeout=100) == 0


@pytest.mark.parametrize("hurry", [False, True])
def test_a_stream_that_cannot_finish_is_failed_properly(tmp_path: Path, hurry: bool) -> None:
    body = {"model": "worker", "prompt": [HOLD], "max_tokens": 400, "stream": True, "return_token_ids": True}
    grace = "1000" if hurry else "0"
    with (
        serving(tmp_path, "--shutdown-timeout", grace) as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response,
    ):
        found = events(response)
        next(found)
        server.process.send_signal(signal.SIGINT)
        if hurry:
            server.until(lambda: "Stopping" in server.log)
            server.process.send_signal(signal.SIGINT)
        assert "shut down" in str(list(found)[-1]["error"])
        assert server.process.wait(timeout=100) == 0


def test_a_dead_worker_shows_in_health(tmp_path: Path) -> None:
    body = {"model": "worker", "prompt": [HOLD], "max_tokens": 400, "stream": True, "return_token_ids": True}
    with serving(tmp_path, "--no-restart") as server:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            found = events(response)
            next(found)
            os.kill(server.children()[0], signal.SIGKILL)
            assert "killed by SIGKILL" in str(list(found)[-1]["error"])
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert server.post("/v1/completions", {"model": "worker", "prompt": [5]}).status_code == 503
        assert server.stop() == 0


def test_a_dead_worker_is_started_again_and_goes_on_with_its_requests(tmp_path: Path) -> None:
    """Also where it is the only one: nobody looks at a server that stands there and answers 503."""
    body = {"model": "worker", "prompt": [SLOW], "max_tokens": 400, "seed": 3, "return_token_ids": True}
    with serving(tmp_path) as server:
        (alone,) = server.post("/v1/completions", body).json()["choices"]
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=100
        ) as response:
            found = events(response)
            told = [next(found)]
            os.kill(server.children()[0], signal.SIGKILL)
            told += found
        tokens = [token for event in told for token in event["choices"][0].get("token_ids") or []]  # type: ignore[index]
        assert tokens == alone["token_ids"] and len(tokens) == 400
        assert httpx.get(f"{server.url}/health").status_code == 200 and "killed by SIGKILL" in server.log
        assert 'peft_dist:replica_restarts_total{replica="0"} 1.0' in httpx.get(f"{server.url}/metrics").text
        assert server.stop() == 0


def test_a_signal_while_the_model_loads_ends_everything(tmp_path: Path) -> None:
    server = Server(tmp_path, "--replica-factory", "tests.worker.fake_replica:build_hanging")
    try:
        server.until(server.children)
        assert server.stop(signal.SIGINT) == 0
        assert not server.port_file.exists()
    finally:
        server.process.kill()
        server.process.wait()


def failing(*options: str, model: Path = MODEL) -> tuple[int, str]:
    done = subprocess.run(
        [*COMMAND, "serve", str(model), *options], capture_output=True, text=True, cwd=ROOT, timeout=280
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "sql"], "NAME=PATH"),
        (["--adapter-dir", "/nonexistent"], "/nonexistent"),
        (["--adapter", "a=adapters/one", "--adapter", "a=adapters/two"], "--adapter names 'a' twice"),
        (["--max-num-seqs", "0"], "max_num_seqs=0"),
        (["--preemption", "never"], "auto, recompute, swap"),
        ([*FAKE, "--port", "0", "--adapter", "sql=/nonexistent"], "/nonexistent"),
        (["--adapter", "sql=/nonexistent", "--pin-adapter", "json"], "names 'json', which is no adapter given"),
        ([*FAKE[:2], "--replica-factory", "tests.worker.fake_replica:build_failing", "--port", "0"], "choose another"),
    ],
)
def test_what_cannot_be_served_is_one_line_and_status_1(options: list[str], message: str) -> None:
    status, output = failing(*options)
    assert status == 1 and message in output
    assert "Traceback" not in output


FAILING = [*FAKE[:2], "--replica-factory", "tests.worker.fake_replica:build_failing", "--port", "0"]


@pytest.mark.parametrize("options", [[], ["--replicas", "2"]], ids=["one", "two"])
def test_why_the_start_failed_is_told_once(options: list[str]) -> None:
    status, output = failing(*FAILING, *options)
    assert status == 1 and output.count("cannot be loaded: choose another") == 1, output
    assert output.splitlines()[-1].startswith("peft-dist: Replica ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "sql=/nonexistent"], "adapter '/nonexistent': there is no such folder"),
        (["--adapter", "sql=./nonexistent"], "adapter './nonexistent': there is no such folder"),
        (["--port-file", "/nonexistent/port"], "--port-file /nonexistent/port cannot be written: there is no folder"),
    ],
)
def test_what_cannot_be_served_is_known_before_the_model_is_loaded(options: list[str], message: str) -> None:
    status, output = failing(*FAILING, *options)
    assert status == 1 and message in output and "Traceback" not in output
    assert "choose another" not in output  # What the model would have failed of.


def test_a_port_in_use_is_known_before_the_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, output = failing("--port", str(taken.getsockname()[1]))
    assert status == 1 and "choose another --host or --port" in output


def test_version() -> None:
    done = subprocess.run([*COMMAND, "version"], capture_output=True, text=True, cwd=ROOT, timeout=280, check=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", done.stdout)
