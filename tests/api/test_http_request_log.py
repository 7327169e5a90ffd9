"""``--log-requests``: one line for each request, without a word of it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any

import httpx
import pytest
from fastapi import Request

from peft_dist.api.options import ServerOptions
from peft_dist.api.request_log import logger, of
from peft_dist.api.request_metrics import RequestEnd, RequestMetrics
from tests.api.http_support import ANSWERS, BASE, BODIES, CHAT, COMPLETIONS, ScriptedClient, encode, serving

SECRET = "hello secret"
LINE = re.compile(
    r"Request (?P<id>\S+): model=(?P<model>\S+) prompt_tokens=(?P<prompt>\d+) output_tokens=(?P<output>\d+) "
    r"finish=(?P<finish>\S+) first_token=(?P<first>\S+) seconds=(?P<seconds>\d+\.\d{3})"
)
OTHER = re.compile(r"Request (?P<path>/\S+): status=(?P<status>\d+) seconds=\d+\.\d{3} id=(?P<id>\S+)")
Log = Callable[[ScriptedClient, Callable[[httpx.Client], Any]], list[str]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Log:
    """What a server that lives as long as some requests logs of them."""
    caplog.set_level(logging.INFO, logger=logger.name)

    def of_requests(engine: ScriptedClient, ask: Callable[[httpx.Client], Any], *, is_on: bool = True) -> list[str]:
        with (
            serving(engine, ServerOptions(log_requests=is_on)) as url,
            httpx.Client(base_url=url, timeout=30) as http,
        ):
            ask(http)
        return [record.getMessage() for record in caplog.records if record.name == logger.name]

    return of_requests


def one(lines: list[str], pattern: re.Pattern[str]) -> dict[str, str]:
    (line,) = lines
    found = pattern.fullmatch(line)
    assert found is not None, line
    return found.groupdict()


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion(engine: ScriptedClient, lines: Log, stream: bool) -> None:
    ids: list[str] = []

    def ask(http: httpx.Client) -> None:
        body = {"model": "sql", "prompt": SECRET, "max_tokens": 100, "stream": stream}
        ids.append(http.post(COMPLETIONS, json=body).headers["x-request-id"])

    told = lines(engine, ask)
    found = one(told, LINE)
    assert (found["id"], found["model"], found["finish"]) == (ids[0], "'sql'", "stop")
    assert int(found["prompt"]) == len(encode(SECRET)) + 1
    assert int(found["output"]) == len(encode(ANSWERS["sql"])) + 1
    assert 0 <= float(found["first"]) <= float(found["seconds"])
    assert "secret" not in told[0] and "SELECT" not in told[0]


def test_a_chat_of_several_choices(engine: ScriptedClient, lines: Log) -> None:
    # The second choice is longer than the first, by the letter that it begins with.
    body = {**BODIES[CHAT], "model": "json", "n": 2, "max_tokens": len(encode(ANSWERS["json"])) + 1}
    found = one(lines(engine, lambda http: http.post(CHAT, json=body)), LINE)
    assert found["id"].startswith("chatcmpl-")
    assert found["finish"] == "stop:1,length:1"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves(engine: ScriptedClient, lines: Log, stream: bool) -> None:
    engine.hang_at = 2

    def ask(http: httpx.Client) -> None:
        connection = HTTPConnection(http.base_url.host, http.base_url.port or 0, timeout=30)
        body = json.dumps({**BODIES[COMPLETIONS], "stream": stream})
        connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
        assert engine.hanging.wait(10)
        connection.close()
        assert engine.closed_early.wait(10)

    found = one(lines(engine, ask), LINE)
    assert (found["finish"], found["output"]) == ("abort", "2")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails(engine: ScriptedClient, lines: Log, stream: bool) -> None:
    engine.fail_at = 0
    body = {**BODIES[COMPLETIONS], "stream": stream}
    found = one(lines(engine, lambda http: http.post(COMPLETIONS, json=body)), LINE)
    assert (found["finish"], found["output"], found["first"]) == ("error", "0", "none")


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (COMPLETIONS, {"model": BASE}, 400),
        (CHAT, {**BODIES[CHAT], "model": "nobody"}, 404),
        (COMPLETIONS, {**BODIES[COMPLETIONS], "prompt": [5] * 1000}, 400),
        ("/tokenize", {"prompt": SECRET}, 200),
        ("/detokenize", {"tokens": [-1]}, 400),
    ],
)
def test_requests_that_draw_nothing(engine: ScriptedClient, lines: Log, path: str, body: Any, status: int) -> None:
    found = one(lines(engine, lambda http: http.post(path, json=body)), OTHER)
    assert (found["path"], found["status"]) == (path, str(status))


def test_a_full_queue(engine: ScriptedClient, lines: Log) -> None:
    engine.full = True

    def ask(http: httpx.Client) -> None:
        assert http.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "prompt": ["a", "b"]}).status_code == 429

    assert one(lines(engine, ask), OTHER)["status"] == "429"


def test_other_routes_are_not_told(engine: ScriptedClient, lines: Log) -> None:
    assert lines(engine, lambda http: [http.get(path) for path in ("/health", "/metrics", "/v1/models")]) == []


def test_nothing_is_told_unless_it_is_asked_for(engine: ScriptedClient, lines: Any) -> None:
    def ask(http: httpx.Client) -> None:
        assert http.post(COMPLETIONS, json=BODIES[COMPLETIONS]).status_code == 200
        assert http.post(COMPLETIONS, json={}).status_code == 400

    assert lines(engine, ask, is_on=False) == []


def test_times_and_counts() -> None:
    now, told = [10.0], list[RequestEnd]()
    watch = RequestMetrics(5, clock=lambda: now[0]).watch(None, told.append)
    watch.admitted(3, 7)
    for at, index, num_tokens, reason in ((12.0, 1, 1, None), (13.0, 0, 2, "stop"), (14.0, 1, 1, "stop")):
        now[0] = at
        watch.progress(index, num_tokens, reason)
    now[0] = 16.5
    watch.end()
    watch.end()
    assert told == [RequestEnd(7, 4, {"stop": 2, "abort": 1}, 2.0, 6.5)]


def test_who_was_not_admitted_did_not_end() -> None:
    told = list[RequestEnd]()
    RequestMetrics(5).watch(None, told.append).end()
    assert told == []


def test_a_name_is_one_word_of_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=logger.name)
    of(Request({"type": "http", "headers": []}), "cmpl-1", "a\nb")(RequestEnd(1, 0, {"abort": 1}, None, 0.0))
    assert caplog.messages == [
        r"Request cmpl-1: model='a\nb' prompt_tokens=1 output_tokens=0 finish=abort first_token=none seconds=0.000"
    ]
