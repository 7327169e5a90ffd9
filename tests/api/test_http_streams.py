"""Server-sent events byte by byte, and clients that go away in the middle."""

from __future__ import annotations

import http.client
import json
import threading
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from peft_dist.workload.streams import Stream
from tests.api.http_support import BASE, QUEUE_SECONDS, ScriptedClient, encode

COMPLETION = {"model": BASE, "prompt": "hello", "max_tokens": 3}
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


def events(response: httpx.Response) -> list[Any]:
    """The decoded events; fails unless every one is a ``data:`` line and a blank line."""
    assert response.text.endswith("\n\n")
    blocks = response.text[:-2].split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def test_headers(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={**COMPLETION, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-request-id"] == events(response)[0]["id"]
    whole = http.post("/v1/completions", json=COMPLETION)
    assert whole.headers["x-request-id"] == whole.json()["id"]


@pytest.mark.parametrize("of_every_chunk", [False, True])
@pytest.mark.parametrize(("route", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
def test_the_time_in_the_queue_is_told_and_the_workload_client_reads_it(
    http: httpx.Client, route: str, body: dict[str, Any], of_every_chunk: bool
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": of_every_chunk}
    response = http.post(route, json={**body, "n": 2, "stream": True, "stream_options": options})
    read = Stream()
    read.feed(response.content, 0.0)
    longest = 2 * QUEUE_SECONDS
    assert read.queueing == events(response)[-1]["usage"]["queue_time"] == longest
    assert http.post(route, json={**body, "n": 2}).json()["usage"]["queue_time"] == longest


def test_no_time_in_the_queue_is_told_before_anything_ran(http: httpx.Client) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    opening, first, *_ = events(
        http.post("/v1/chat/completions", json={**CHAT, "stream": True, "stream_options": options})
    )
    assert opening["usage"]["queue_time"] is None
    assert first["usage"]["queue_time"] == QUEUE_SECONDS


def test_completion_events(http: httpx.Client) -> None:
    body = {**COMPLETION, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(http.post("/v1/completions", json=body))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["hello", " w", "\ufffd"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
    assert all(chunk["usage"] is None and chunk["object"] == "text_completion" for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 3)


def test_usage_is_left_out_unless_asked_for(http: httpx.Client) -> None:
    for options in ({}, {"stream_options": {}}, {"stream_options": {"include_usage": False}}, {"stream_options": None}):
        chunks = events(http.post("/v1/completions", json={**COMPLETION, "stream": True, **options}))
        assert not any("usage" in chunk for chunk in chunks)


def test_chat_events_in_order(http: httpx.Client) -> None:
    chunks = events(http.post("/v1/chat/completions", json={**CHAT, "stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "hello"},
        {"content": " w"},
        {"content": "\ufffd"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["length"]


def test_streamed_token_ids(http: httpx.Client) -> None:
    chunks = events(http.post("/v1/chat/completions", json={**CHAT, "stream": True, "return_token_ids": True}))
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])] == encode("hello wö")[:3]
    chunks = events(http.post("/v1/completions", json={**COMPLETION, "stream": True, "return_token_ids": True}))
    assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == encode("hello wö")[:3]
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [0, *encode("hello")]


@pytest.mark.parametrize("prompt", ["hello", ["a", "b"]], ids=["one", "batch"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("step", [0, 2])
def test_client_that_goes_away_frees_its_requests_between_tokens(
    engine: ScriptedClient, url: str, prompt: Any, stream: bool, step: int
) -> None:
    engine.hang_at = step
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port or 0, timeout=100)
    body = json.dumps({**COMPLETION, "prompt": prompt, "n": 2, "stream": stream})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    assert engine.hanging.wait(60)
    assert engine.streams
    connection.close()
    assert engine.idle.wait(60), "the requests of a client that is gone still run"
    assert engine.closed_early.is_set()
    engine.hang_at = None
    assert httpx.post(f"{url}/v1/completions", json=COMPLETION).status_code == 200


def test_chat_client_that_goes_away(engine: ScriptedClient, url: str) -> None:
    engine.hang_at = 1
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        for line in response.iter_lines():
            if "hello" in line:
                break
    assert engine.idle.wait(60)


def test_one_that_goes_away_disturbs_no_other(engine: ScriptedClient, url: str) -> None:
    """The other stream is in the middle while the first one is cut off."""
    engine.hang_at = 2
    texts: list[str] = []

    def read() -> None:
        body = {**COMPLETION, "max_tokens": 11, "stream": True}
        response = httpx.post(f"{url}/v1/completions", json=body, timeout=100)
        texts.append("".join(event["choices"][0]["text"] for event in events(response)))

    reader = threading.Thread(target=read)
    reader.start()
    assert engine.hanging.wait(60)
    engine.hanging.clear()
    with httpx.stream("POST", f"{url}/v1/completions", json={**COMPLETION, "stream": True}):
        assert engine.hanging.wait(60)
    assert engine.closed_early.wait(60)
    engine.release()
    reader.join(100)
    assert texts == ["hello wörld, na"]


def test_streams_end_with_an_error_when_the_engine_stops(engine: ScriptedClient, url: str) -> None:
    engine.hang_at = 1
    bodies: list[str] = []

    def read() -> None:
        bodies.append(httpx.post(f"{url}/v1/completions", json={**COMPLETION, "stream": True}, timeout=100).text)

    reader = threading.Thread(target=read)
    reader.start()
    assert engine.hanging.wait(60)
    engine.health_error = "the server is stopping"
    engine.release()
    reader.join(100)
    assert '"code":"engine_dead"' in bodies[0]
    assert bodies[0].endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("prompt", ["hello", ["a", "b"]], ids=["one", "batch"])
@pytest.mark.parametrize("step", [0, 1])
def test_streams_end_with_an_error_whatever_goes_wrong(
    engine: ScriptedClient,
    url: str,
    prompt: Any,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(k: int) -> None:
        if k == step:
            raise RuntimeError("an inner secret")

    monkeypatch.setattr(engine, "before_step", fail)
    response = httpx.post(f"{url}/v1/completions", json={**COMPLETION, "prompt": prompt, "stream": True}, timeout=100)
    last = events(response)[-1]
    assert last["error"]["type"] == "server_error" and "log" in last["error"]["message"]
    assert "secret" not in response.text and "an inner secret" in caplog.text
    assert engine.idle.wait(60)
