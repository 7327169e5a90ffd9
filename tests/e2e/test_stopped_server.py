"""A server that is stopped (SIGSTOP) and goes on: its workers drop requests after a while, and keep all else."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.test_restart import guest
from tests.e2e.test_serve import Server, adapter, events, serving
from tests.ports import free_address
from tests.worker.fake_replica import SLOW, expected_token

SILENCE = 4.0
NUM_STREAMS = 8
# They take twice as long as a server may be silent.
NUM_TOKENS = 1600
LONG = ["--replica-factory", "tests.worker.fake_replica:build_long", "--served-model-name", "tiny"]
DROPPED = "its requests are dropped"


def asked(server: Server, number: int) -> Future[list[int]]:
    """The tokens of a stream whose first ones have come; a token that is lost or doubled shows in them."""
    model = ("tiny", "sql")[number % 2]
    sampling = {"max_tokens": NUM_TOKENS, "seed": number, "return_token_ids": True, "stream": True}
    begun: Future[None] = Future()

    def read() -> list[int]:
        tokens: list[int] = []
        body = {"model": model, "prompt": [SLOW, number], **sampling}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=200) as stream:
            for event in events(stream):
                assert "choices" in event, event
                tokens += event["choices"][0]["token_ids"]  # type: ignore[index]
                if not begun.done():
                    begun.set_result(None)
        return tokens

    def ended(future: Future[list[int]]) -> None:
        if not begun.done():
            begun.set_exception(future.exception() or AssertionError("it ended without a token"))

    pool = ThreadPoolExecutor(1)
    future = pool.submit(read)
    future.add_done_callback(ended)
    begun.result(100)
    pool.shutdown(wait=False)
    return future


def expected(number: int) -> list[int]:
    content = hashlib.sha256(b"two").hexdigest()[:8] if number % 2 else ""
    return [expected_token(number, 0, draw, content) for draw in range(NUM_TOKENS)]


def stop_for(server: Server, num_workers: int) -> None:
    """Until every worker has dropped its requests; the workers write to the same log."""
    number = server.log.count(DROPPED)
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        while server.log.count(DROPPED) < number + num_workers:
            time.sleep(0.02)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("num_replicas", "state"),
    [
        pytest.param(1, True, id="one", marks=pytest.mark.slow),
        pytest.param(2, False, id="two that would end with it", marks=pytest.mark.slow),
        pytest.param(2, True, id="two", marks=pytest.mark.slow),
    ],
)
def test_streams_go_on_and_no_model_or_adapter_is_loaded_again(num_replicas: int, state: bool, tmp_path: Path) -> None:
    sql = adapter(tmp_path / "sql", "two")
    options = ["--replicas", str(num_replicas), "--adapter", f"sql={sql}", *LONG]
    options += ["--heartbeat-timeout", str(SILENCE), *(["--state-dir", str(tmp_path / "state")] if state else [])]
    with serving(tmp_path, *options) as server:
        workers = server.children()
        # What is read from now on would be something else.
        (sql / "adapter_config.json").write_text("bad")
        for life in range(num_replicas):
            streams = {number: asked(server, number) for number in range(NUM_STREAMS)}
            stop_for(server, num_replicas)
            assert {number: stream.result(60) for number, stream in streams.items()} == {
                number: expected(number) for number in streams
            }
            server.until(lambda: httpx.get(f"{server.url}/ready?replicas={num_replicas}").status_code == 200)
            assert server.children() == workers and server.log.count("with what it holds") >= num_replicas * (life + 1)
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'peft_dist:replica_restarts_total{replica="0"} 0.0' in metrics
        assert server.stop() == 0 and "Traceback" not in server.log


@pytest.mark.slow
def test_a_short_stop_is_nobody_s_silence(tmp_path: Path) -> None:
    with serving(tmp_path, *LONG, "--heartbeat-timeout", "4") as server:
        stream = asked(server, 2)
        os.kill(server.process.pid, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(server.process.pid, signal.SIGCONT)
        assert stream.result(30) == expected(2)
        assert DROPPED not in server.log and "goes on" not in server.log


@pytest.mark.slow
def test_workers_of_a_stopped_server_that_is_killed_wait_for_the_next_one(tmp_path: Path) -> None:
    state = ["--state-dir", str(tmp_path / "state"), "--heartbeat-timeout", str(SILENCE), *LONG]
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    with serving(tmp_path / "first", *state) as first:
        workers = first.children()
        stream = asked(first, 2)
        stop_for(first, 1)
        assert stream.result(30) == expected(2)
        # Its end is that of a process that the worker was told of, not the one that started it.
        first.process.kill()
        first.process.wait()
        with serving(tmp_path / "second", *state) as second:
            assert asked(second, 2).result(30) == expected(2)
            assert "outlived the server" in second.log and Path(f"/proc/{workers[0]}").exists()
            assert second.stop() == 0


@pytest.mark.slow
def test_a_replica_that_joined_goes_on_as_well(tmp_path: Path) -> None:
    address = free_address()
    options = ["--replicas", "0", "--listen", address, "--heartbeat-timeout", str(SILENCE), *LONG]
    with guest(tmp_path, address, "--silence", str(SILENCE)) as one, serving(tmp_path, *options) as server:
        worker, streams = one.worker, {number: asked(server, number) for number in (0, 2, 4)}
        os.kill(server.process.pid, signal.SIGSTOP)
        while "the orchestrator has been silent" not in one.log_file.read_text():
            time.sleep(0.02)
        os.kill(server.process.pid, signal.SIGCONT)
        assert {number: stream.result(60) for number, stream in streams.items()} == {
            number: expected(number) for number in streams
        }
        assert one.worker == worker is not None and "and it goes on with what it holds" in server.log
        assert server.stop() == 0
        # It ends with the server, as the incarnation that it is by now.
        assert one.process.wait(30) == 0
