"""The open-loop client against a peer's server and against ours, and the runs that it refuses to report."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from peft_dist import cli
from peft_dist.core.errors import ConfigError
from peft_dist.workload import client, files, records
from peft_dist.workload.arrivals import Arrival, Workload
from peft_dist.workload.client import LateClientError, Outcome
from peft_dist.workload.prompts import Prompts
from peft_dist.workload.queueing import ServerQueue
from peft_dist.workload.sending import ClientOptions
from peft_dist.workload.streams import Stream
from tests.e2e.test_serve import adapter, serving
from tests.workload.peer import Peer, running


def workload(*arrivals: tuple[float, str | None, int, int]) -> Workload:
    return Workload(tuple(Arrival(*arrival) for arrival in arrivals), {"seed": 0})


def run(peer: Peer, requests: Workload, **options: object) -> Outcome:
    async def both() -> Outcome:
        async with running(peer):
            return await client.run(requests, ClientOptions(peer.url, **options))  # type: ignore[arg-type]

    return asyncio.run(both())


def test_a_peer_is_asked_at_the_times_of_the_workload() -> None:
    peer = Peer(usage={"prompt_tokens": 9, "completion_tokens": 4, "queue_time": 0.25})
    requests = workload((0.0, "sql", 5, 4), (0.1, None, 3, 4), (0.1, "sql", 6, 4))
    ended: list[int] = []

    async def both() -> Outcome:
        async with running(peer):
            options = ClientOptions(peer.url + "/v1/", "base", "key", warm_up=0, extra={"top_p": 0.5})
            return await client.run(requests, options, lambda record: ended.append(record.index))

    outcome = asyncio.run(both())
    outcome.check_schedule(60.0)
    assert sorted(ended) == [0, 1, 2] and [r.index for r in outcome.records] == [0, 1, 2]
    assert [r.adapter for r in outcome.records] == ["sql", None, "sql"]
    for record, arrival in zip(outcome.records, requests.arrivals, strict=True):
        assert record.error is None and record.scheduled == arrival.time <= record.sent
        assert record.first_token is not None and record.sent < record.first_token <= record.finished
        assert (record.prompt_tokens, record.output_tokens, record.queueing) == (9, 4, 0.25), "as the server counts"
        assert len(record.itl) == 3 and min(record.itl) >= 0
    assert outcome.queue is None
    assert peer.keys == ["bearer key"] * 3
    by_length = {len(body["prompt"]): body for body in peer.bodies}
    assert sorted(by_length) == [3, 5, 6] and by_length[3]["model"] == "base"
    body = by_length[5]
    assert (body["max_tokens"], body["ignore_eos"], body["temperature"], body["top_p"]) == (4, True, 1.0, 0.5)
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_open_loop_requests_do_not_wait_for_answers() -> None:
    """All of them are under way together: the server answers none before it has seen all."""
    arrived = 0
    everyone = asyncio.Event()

    class Holding(Peer):
        async def _answer(self, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
            nonlocal arrived
            arrived += 1
            if arrived == 300:
                everyone.set()
            await everyone.wait()
            await super()._answer(body, writer)

    outcome = run(Holding(), workload(*[(0.0, "a", 2, 2)] * 300), warm_up=0)
    assert [r.error for r in outcome.records] == [None] * 300


def test_several_processes_send_one_workload_on_one_clock() -> None:
    peer, ended = Peer(), []
    requests = workload(*((0.05 * number, f"m{number % 3}", 10 + number, 2) for number in range(7)))

    async def both() -> Outcome:
        async with running(peer):
            options = ClientOptions(peer.url, warm_up=0, processes=2)
            return await client.run(requests, options, lambda record: ended.append(record.index))

    outcome = asyncio.run(both())
    assert sorted(ended) == list(range(7)) == [record.index for record in outcome.records]
    assert sorted(len(body["prompt"]) for body in peer.bodies) == list(range(10, 17))
    for record, arrival in zip(outcome.records, requests.arrivals, strict=True):
        assert record.error is None and record.adapter == arrival.adapter
        assert arrival.time <= record.sent < arrival.time + 60


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("unknown", "HTTP 404: no such"),
        ("broken", "broke off"),
        ("sick", "out of memory"),
        ("mute", "no end after 2.0 s"),
    ],
)
def test_failures_are_records_and_the_others_go_on(model: str, message: str) -> None:
    # The others have to be answered by then as well.
    timeout = 2.0 if model == "mute" else 60.0
    outcome = run(Peer(), workload((0.0, model, 2, 3), (0.0, "fine", 2, 3)), warm_up=0, timeout=timeout)
    failed, fine = outcome.records
    assert failed.error is not None and message in failed.error
    assert fine.error is None and fine.output_tokens == 3, "events are counted where there is no usage"
    found = records.summarize(outcome.records, records.Objectives(normalized_latency=None))
    assert (found.failed, found.slo_attainment) == (1, 0.5)


def test_a_server_that_is_not_there() -> None:
    found = asyncio.run(client.run(workload((0.0, "a", 1, 1)), ClientOptions("http://127.0.0.1:9", warm_up=0)))
    assert "Connect" in (found.records[0].error or "")


def test_a_warm_up_asks_every_adapter_and_refuses_to_go_on_without_one() -> None:
    peer = Peer()
    outcome = run(peer, workload((0.0, "a", 50, 1), (0.0, "b", 50, 1)), warm_up=2)
    assert len(outcome.records) == 2
    assert sorted((body["model"], len(body["prompt"])) for body in peer.bodies[:4]) == [("a", 16)] * 2 + [("b", 16)] * 2
    assert len({str(body["prompt"]) for body in peer.bodies}) == 6, "no prompt is in a cache"
    with pytest.raises(ConfigError, match="'unknown' does not answer: HTTP 404"):
        run(Peer(), workload((0.0, "a", 5, 1), (0.0, "unknown", 5, 1)))


@pytest.mark.parametrize(
    ("readies", "within", "told", "asked"),
    [
        ([(200, '{"serving": 2}'), (503, "{}"), (503, "{}"), (200, '{"serving": 2}')], 60.0, True, 4),
        ([(200, '{"serving": 2}')] + [(503, "{}")] * 99, 0.3, False, None),
        ([(200, "[]")], 60.0, None, 1),
        ([(200, "<html>")], 60.0, None, 1),
        ([], 60.0, None, 1),
        ([(200, '{"serving": 2}')], 0.0, None, 0),
    ],
)
def test_a_server_that_tells_is_waited_for_until_it_is_warm(
    readies: list[tuple[int, str]], within: float, told: bool | None, asked: int | None
) -> None:
    peer = Peer(readies=readies)
    outcome = run(peer, workload((0.0, "a", 5, 1)), warm_up=0, warm_within=within)
    assert outcome.was_warm is told and outcome.records[0].error is None
    assert asked is None or len(peer.asked) == asked
    assert all(path == "/ready?warm=true&replicas=2" for path in peer.asked[1:])


@pytest.mark.parametrize("name", ["peft_dist:request_queue_seconds", "vllm:request_queue_time_seconds"])
def test_queueing_from_metrics(name: str) -> None:
    before = f'{name}_sum{{engine="0"}} 10.0\n{name}_count{{engine="0"}} 1e2\n{name}_count{{engine="1"}} 5\n'
    after = before.replace("10.0", "10.5").replace("1e2", "102") + f"{name}_count 3e0\n"
    requests = workload((0.0, "a", 5, 1), (0.0, "a", 5, 1))
    outcome = run(Peer(metrics=[before, after]), requests, warm_up=0)
    e2e = sum(record.e2e for record in outcome.records)
    assert outcome.queue == ServerQueue(name, 5, 0.5, pytest.approx(0.5 / e2e))
    assert run(Peer(metrics=[before, before]), requests, warm_up=0).queue is None


def test_a_client_that_falls_behind_reports_nothing() -> None:
    # The peer runs in the client's own loop, and blocks it: a client without a processor.
    peer = Peer(block=lambda: time.sleep(0.2))
    outcome = run(peer, workload((0.0, "busy", 1, 1), *[(0.01, "a", 1, 1)] * 5), warm_up=0)
    with pytest.raises(LateClientError, match=r"requests were sent \d+\.\d"):
        outcome.check_schedule(0.05)
    outcome.check_schedule(60.0)
    with pytest.raises(LateClientError, match="own loop"):
        Outcome((), (0.0, 0.0, 0.3), None).check_schedule(0.05)


EVENTS = [
    b'data: {"choices":[{"text":"a"}],"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\n',
    b'data: {"choices":[{"text":""}],"usage":{"prompt_tokens":3,"completion_tokens":2}}\r\n\r\n',
    b'data: {"choices":[{"text":"","finish_reason":"length"}],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n',
    b': ping\n\ndata:{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n',
    b"data: [DONE]\n\n",
]


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(1, sum(map(len, EVENTS)) - 1), max_size=8))
def test_streams_may_be_cut_anywhere(cuts: set[int]) -> None:
    """A token without text counts by the running usage; an event that brings none is no token."""
    data, stream = b"".join(EVENTS), Stream()
    edges = [0, *sorted(cuts), len(data)]
    for start, end in itertools.pairwise(edges):
        stream.feed(data[start:end], float(end))
    stream.end()
    assert (stream.prompt_tokens, stream.output_tokens, stream.error) == (3, 2, None)
    ends = [data.index(b"\n") + 1, data.index(b"\r\n") + 2]
    assert stream.times == [min(edge for edge in edges if edge >= end) for end in ends], "when its line was there"


def test_streams_that_are_none() -> None:
    stream = Stream()
    stream.feed(b"data: {oops\n\n", 0.0)
    stream.end()
    assert stream.error is not None and "cannot be read" in stream.error and "{oops" in stream.error


@pytest.mark.parametrize("kind", ["ids", "text"])
def test_prompts(kind: str) -> None:
    prompts = Prompts(kind, 10, 20)  # type: ignore[arg-type]
    # That of times is another one: (0, 3, 0) is the first adapter's in interval 3.
    assert Prompts(end_id=30_000).make(3, 9) != np.random.default_rng((0, 3, 0)).integers(100, 30_000, 9).tolist()
    made = [prompts.make(index, 8) for index in (0, 1, -1, -2)]
    assert len({str(prompt) for prompt in made}) == 4 and made[0] == prompts.make(0, 8)
    for prompt in made:
        words = prompt.split(" ") if isinstance(prompt, str) else prompt
        assert len(words) == 8
        assert kind == "text" or {10 <= token < 20 for token in words} == {True}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClientOptions("localhost:8000"), "no URL"),
        (lambda: ClientOptions("http://x", warm_up=-1), "warm_up=-1 .* 0 or more"),
        (lambda: ClientOptions("http://x", max_lateness=float("nan")), "max_lateness=nan .* above 0"),
        (lambda: ClientOptions("http://x", max_lateness=float("inf")), "max_lateness=inf"),
        (lambda: ClientOptions("http://x", timeout=0), "timeout=0 "),
        (lambda: ClientOptions("http://x", timeout=float("nan")), "timeout=nan"),
        (lambda: ClientOptions("http://x").model(None), "--base-model"),
        (lambda: Prompts("words"), "ids or text"),
        (lambda: Prompts(first_id=9, end_id=9), "--first-id"),
        (lambda: Prompts(seed=-1), "seed=-1"),
    ],
)
def test_what_cannot_be_is_refused(call: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()  # type: ignore[operator]


def test_bench_against_our_own_server(tmp_path: Path) -> None:
    """From a workload on disk to records on disk, with keys, adapters and our metrics."""
    sql = adapter(tmp_path / "sql", "two")
    requests = workload((0.0, "sql", 5, 20), (0.05, None, 3, 4), (0.1, "sql", 6, 1))
    files.write(requests, tmp_path / "load.jsonl")
    options = ["--base-model", "tiny", "--first-id", "10", "--end-id", "1000", "--max-lateness", "60"]
    with serving(
        tmp_path, "--adapter", f"sql={sql}", "--served-model-name", "tiny", PEFT_DIST_API_KEY="key-of-anna"
    ) as server:
        output = ["--output", str(tmp_path / "run.json"), "--csv", str(tmp_path / "run.csv")]
        arguments = ["bench", server.url, str(tmp_path / "load.jsonl"), *options, *output]
        refused = CliRunner().invoke(cli.app, arguments)
        assert isinstance(refused.exception, ConfigError) and "HTTP 401" in str(refused.exception)
        shown = CliRunner().invoke(cli.app, arguments, env={"PEFT_DIST_API_KEY": "key-of-anna"})
        assert shown.exit_code == 0, shown.exception
        assert "\npeft_dist:request_queue_seconds_count" in httpx.get(f"{server.url}/metrics").text
        assert server.stop() == 0
    for words in ("3 requests in", "0 failed", "per output token"):
        assert words in shown.output
    assert "shorter" not in shown.output
    found = records.read_json(tmp_path / "run.json")
    assert [(r.prompt_tokens, r.output_tokens) for r in found.records] == [(5, 20), (3, 4), (6, 1)]
    assert all(r.error is None and r.first_token is not None for r in found.records)
    assert found.source["workload"] == {"seed": 0} and found.source["server_queue"] is None, "the fake tells no queue"
    assert "key-of-anna" not in (tmp_path / "run.json").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["summary"]["slo_attainment"] == 1.0
    assert len((tmp_path / "run.csv").read_text().splitlines()) == 5


def test_bench_says_beforehand_where_it_cannot_write_and_afterwards_that_it_was_late(tmp_path: Path) -> None:
    files.write(workload((0.0, "a", 1, 1), (0.01, "short", 1, 9)), tmp_path / "load.csv")
    with ServedPeer() as url:
        arguments = ["bench", url, str(tmp_path / "load.csv"), "--output"]
        refused = CliRunner().invoke(cli.app, [*arguments, str(tmp_path / "none" / "run.json")])
        assert "could not be written" in str(refused.exception)
        late = CliRunner().invoke(cli.app, [*arguments, str(tmp_path / "run.json"), "--max-lateness", "1e-9"])
        assert isinstance(late.exception, LateClientError) and not (tmp_path / "run.json").exists()
        assert "goodput" not in late.output
        shown = CliRunner().invoke(
            cli.app, [*arguments, str(tmp_path / "run.json"), "--max-lateness", "60", "--slo", "0"]
        )
        assert shown.exit_code == 0 and "1 answers were shorter" in shown.output and "(answered)" in shown.output
        wrong = CliRunner().invoke(cli.app, ["bench", url, str(tmp_path / "load.csv"), "--extra-body", "[1]"])
        assert "no JSON object" in str(wrong.exception)


class ServedPeer:
    """A peer in a thread, for a client with a loop of its own."""

    def __enter__(self) -> str:
        peer, self._loop, ready = Peer(), asyncio.new_event_loop(), threading.Event()
        self._stop = asyncio.Event()

        async def serve() -> None:
            async with running(peer):
                ready.set()
                await self._stop.wait()

        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(serve()))
        self._thread.start()
        ready.wait()
        return peer.url

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()
