"""Every way to ask wrongly gets a clear error in OpenAI's shape, and costs nobody else anything."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from peft_dist.api.server import build_app
from tests.api.http_support import (
    BASE,
    BODIES,
    CHAT,
    COMPLETIONS,
    MAX_MODEL_LEN,
    ScriptedClient,
    error_of,
    make_tokenizer,
    serving,
)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "JSON"),
        (b'{"model": }', "JSON"),
        (b"\xff\xfe\xfa", "JSON"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        (b"", "object"),
        (b"[" * 15_000, "deep"),
        (b'{"seed": ' + b"1" * 5000 + b"}", "JSON"),
        (b"[1]", "object"),
    ],
)
def test_malformed_json(shared: httpx.Client, content: bytes, text: str) -> None:
    response = shared.post(COMPLETIONS, content=content, headers={"Content-Type": "application/json"})
    error = error_of(response, 400)
    assert (error["code"], error["param"]) == ("invalid_json", None)
    assert text in error["message"] and "There was an error parsing" not in error["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
    ],
)
def test_bodies_that_are_not_plain_json(shared: httpx.Client, headers: dict[str, str]) -> None:
    error_of(shared.post(COMPLETIONS, content=b"{}", headers=headers), 415)


def test_bodies_that_are_too_large(shared: httpx.Client) -> None:
    body = json.dumps({**BODIES[COMPLETIONS], "prompt": "x" * 20_000}).encode()
    headers = {"Content-Type": "application/json"}
    assert "20000 bytes" in error_of(shared.post(COMPLETIONS, content=body, headers=headers), 413)["message"]
    unannounced = (body[i : i + 1000] for i in range(0, len(body), 1000))
    assert "20000 bytes" in error_of(shared.post(COMPLETIONS, content=unannounced, headers=headers), 413)["message"]
    assert shared.post(COMPLETIONS, json=BODIES[COMPLETIONS]).status_code == 200


@pytest.mark.parametrize(
    ("route", "change", "param"),
    [
        (COMPLETIONS, {"prompt": [5] * MAX_MODEL_LEN}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * MAX_MODEL_LEN, "max_tokens": None}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", "b" * 600]}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * 500, "max_tokens": 13}, "max_tokens"),
        (CHAT, {"messages": [{"role": "user", "content": "b" * 600}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "b" * 600}], "max_tokens": None}, "messages"),
        (CHAT, {"max_tokens": 600}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 600}, "max_completion_tokens"),
    ],
)
def test_prompts_that_are_too_long(shared: httpx.Client, route: str, change: dict[str, Any], param: str) -> None:
    error = error_of(shared.post(route, json={**BODIES[route], **change}), 400)
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert str(MAX_MODEL_LEN) in error["message"]


def test_the_longest_prompt_that_fits(shared: httpx.Client) -> None:
    for length, max_tokens in ((MAX_MODEL_LEN - 1, 1), (MAX_MODEL_LEN, 0)):
        body = {**BODIES[COMPLETIONS], "prompt": [5] * length, "max_tokens": max_tokens}
        assert shared.post(COMPLETIONS, json=body).status_code == 200


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["nobody", "nobody:sql", f"{BASE}:nobody", "", "SQL"])
def test_unknown_models_are_never_answered_by_the_base(
    shared: httpx.Client, shared_engine: ScriptedClient, route: str, stream: bool, name: str
) -> None:
    before = len(shared_engine.requests)
    error = error_of(shared.post(route, json={**BODIES[route], "model": name, "stream": stream}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert len(shared_engine.requests) == before


def test_the_openai_client_raises_its_own_errors(api: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        api.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        api.completions.create(model=BASE, prompt="x", top_p=7)
    assert wrong.value.param == "top_p"


def test_unknown_routes_and_wrong_methods(shared: httpx.Client) -> None:
    assert error_of(shared.get("/v2/nothing"), 404)["code"] == "not_found"
    response = shared.get(COMPLETIONS)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_a_batch_that_never_fits_is_no_full_queue(engine: ScriptedClient, http: httpx.Client) -> None:
    """A client that is told to try again does so for ever, and every time others find no room."""
    engine.most = 5
    assert http.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "prompt": ["a"] * 5}).status_code == 200
    before = len(engine.requests)
    for fields in ({"prompt": ["a"] * 6}, {"prompt": ["a"] * 3, "n": 2}):
        error = error_of(http.post(COMPLETIONS, json={**BODIES[COMPLETIONS], **fields}), 400)
        assert error["param"] == "prompt" and "6 sequences" in error["message"]
    assert len(engine.requests) == before


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue(engine: ScriptedClient, http: httpx.Client, stream: bool) -> None:
    engine.full = True
    body = {**BODIES[COMPLETIONS], "stream": stream}
    assert http.post(COMPLETIONS, json=body).status_code == 200  # The first one finds room.
    response = http.post(COMPLETIONS, json=body)
    assert error_of(response, 429)["code"] == "queue_full"
    assert response.headers["retry-after"] == "3"
    engine.requests.clear()
    error_of(http.post(COMPLETIONS, json={**body, "prompt": ["a", "b"]}), 429)
    assert engine.idle.wait(60), "what was admitted of a refused batch is still running"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", BODIES)
def test_dead_engine(engine: ScriptedClient, http: httpx.Client, route: str, stream: bool) -> None:
    engine.health_error = "the worker was killed"
    error = error_of(http.post(route, json={**BODIES[route], "stream": stream}), 503)
    assert "the worker was killed" in error["message"]
    assert error["type"] == "server_error"
    error_of(http.get("/health"), 503)
    assert http.get("/version").status_code == 200


def test_engine_that_dies_or_fails_meanwhile(engine: ScriptedClient, http: httpx.Client) -> None:
    engine.die_at = 2
    error_of(http.post(COMPLETIONS, json=BODIES[COMPLETIONS]), 503)
    error_of(http.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "prompt": ["a", "b"]}), 503)
    engine.die_at, engine.fail_at = None, 1
    error = error_of(http.post(COMPLETIONS, json=BODIES[COMPLETIONS]), 500)
    assert "not finite" in error["message"]
    assert engine.idle.wait(60)


@pytest.mark.parametrize("route", BODIES)
def test_errors_within_a_stream(engine: ScriptedClient, http: httpx.Client, route: str) -> None:
    engine.die_at = 2
    response = http.post(route, json={**BODIES[route], "stream": True})
    assert response.status_code == 200
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2]) == {
        "error": {"message": "the replica died", "type": "server_error", "param": None, "code": "engine_dead"}
    }
    assert "hello" in events[-3] or "w" in events[-3]


def test_the_openai_client_raises_errors_within_a_stream(engine: ScriptedClient, api: openai.OpenAI) -> None:
    engine.die_at = 2
    with pytest.raises(openai.APIError, match="the replica died"):
        list(api.completions.create(model=BASE, prompt="x", stream=True))


def test_no_tokenizer(engine: ScriptedClient) -> None:
    with serving(engine, tokenizer=None) as url, httpx.Client(base_url=url) as http:
        assert error_of(http.post(COMPLETIONS, json=BODIES[COMPLETIONS]), 400)["param"] == "prompt"
        assert error_of(http.post(CHAT, json=BODIES[CHAT]), 400)["param"] == "messages"
        refused = http.post(COMPLETIONS, json={"model": BASE, "prompt": [5, 6], "stop": "x"})
        assert error_of(refused, 400)["param"] == "stop" and not engine.requests
        body = {"model": BASE, "prompt": [5, 6], "max_tokens": 2, "logprobs": 0, "return_token_ids": True}
        (choice,) = http.post(COMPLETIONS, json=body).json()["choices"]
        assert choice["text"] == ""
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]


def test_no_chat_template(engine: ScriptedClient) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with serving(engine, tokenizer=tokenizer) as url, httpx.Client(base_url=url) as http:
        assert "chat template" in error_of(http.post(CHAT, json=BODIES[CHAT]), 400)["message"]


def test_a_bug_is_a_500_that_tells_nothing(engine: ScriptedClient) -> None:
    app = build_app(engine, make_tokenizer())

    @app.get("/bug")
    async def bug() -> None:
        raise ZeroDivisionError("secret detail")

    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/bug")

    assert "secret" not in str(error_of(asyncio.run(ask()), 500))


@pytest.mark.parametrize("prompt", [r'"half \ud800 a pair"', r'["fine", "\udc00"]'])
def test_text_that_is_no_unicode(shared: httpx.Client, prompt: str) -> None:
    content = f'{{"model": "{BASE}", "prompt": {prompt}}}'
    answer = shared.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
