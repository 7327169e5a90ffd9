"""Ids of requests, and pages of other sites."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest

from peft_dist.api.options import ServerOptions
from peft_dist.api.request_log import logger
from tests.api.http_support import BASE, BODIES, CHAT, COMPLETIONS, ScriptedClient, serving

PAGE = "https://chat.example"


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_own_id_comes_back(shared: httpx.Client, route: str, stream: bool) -> None:
    body = {**BODIES[route], "stream": stream}
    answers = [shared.post(route, json=body, headers={"X-Request-Id": "mine-1"}) for _ in range(2)]
    assert [answer.headers["x-request-id"] for answer in answers] == ["mine-1"] * 2
    if not stream:
        assert answers[0].json()["id"] != answers[1].json()["id"], "one name does not make one request"
        assert shared.post(route, json=body).headers["x-request-id"].startswith(("cmpl-", "chatcmpl-"))


@pytest.mark.parametrize("name", ["", "a b", "x" * 129, "caf\u00e9"])
def test_an_id_that_is_none_is_not_repeated(shared: httpx.Client, name: str) -> None:
    answer = shared.get("/v1/models", headers={"X-Request-Id": name.encode("latin-1")})  # type: ignore[dict-item]
    assert answer.headers["x-request-id"].startswith("req-")


def test_errors_have_one(engine: ScriptedClient, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    cases = [
        (lambda **more: http.get("/v2/nothing", **more), 404),
        (lambda **more: http.post(CHAT, json={"model": BASE}, **more), 400),
        (lambda **more: http.post(COMPLETIONS, content=b"x", **more), 415),
    ]
    for ask, status in cases:
        answer, named = ask(), ask(headers={"X-Request-Id": "mine"})
        assert (answer.status_code, named.status_code) == (status, status)
        assert answer.headers["x-request-id"].startswith("req-") and named.headers["x-request-id"] == "mine"
    monkeypatch.setattr(engine, "resolve", fail)
    answer = http.post(COMPLETIONS, json=BODIES[COMPLETIONS], headers={"X-Request-Id": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")


def test_the_log_has_it(engine: ScriptedClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=logger.name)
    with serving(engine, ServerOptions(log_requests=True)) as url:
        for body in (BODIES[CHAT], {"model": BASE}):
            httpx.post(url + CHAT, json=body, headers={"X-Request-Id": "mine-2"})
    told = [record.getMessage() for record in caplog.records if record.name == logger.name]
    assert [line.split()[-1] for line in told] == ["client_id=mine-2", "id=mine-2"]


def preflight(url: str, origin: str) -> httpx.Response:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return httpx.options(url + CHAT, headers={"Origin": origin, **asked})


def test_pages_of_named_sites_may_ask(engine: ScriptedClient) -> None:
    with serving(engine, ServerOptions(cors_origins=(PAGE,), api_keys=("secret",))) as url:
        answer = preflight(url, PAGE)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in answer.headers["access-control-allow-headers"].lower()
        assert preflight(url, "https://other.example").status_code == 400
        headers = {"Origin": PAGE, "Authorization": "Bearer secret"}
        answer = httpx.post(url + CHAT, json=BODIES[CHAT], headers=headers)
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        # What is refused is told to the page too.
        refused = httpx.post(url + CHAT, json=BODIES[CHAT], headers={"Origin": PAGE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE)


def test_no_page_may_ask_where_none_is_named(engine: ScriptedClient) -> None:
    with serving(engine) as url:
        answer = preflight(url, PAGE)
        assert answer.status_code == 405 and "access-control-allow-origin" not in answer.headers
