"""Draining replicas over HTTP, who may, and what ``/health`` and ``/ready`` say meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest

from peft_dist.api.options import ServerOptions
from tests.api.http_support import ScriptedClient, error_of
from tests.api.test_http_auth import ADMIN, KEYS, REMOTE, ask


def test_a_replica_is_drained_and_resumed(engine: ScriptedClient, http: httpx.Client) -> None:
    drained = http.post("/admin/drain/0", json={})
    assert drained.status_code == 200 and drained.json() == {"replica": 0, "state": "drained"}
    assert http.get("/health").json()["replicas"] == {"0": "drained"}
    assert http.post("/admin/drain/0", json={"restart": True}).json()["state"] == "restarting"
    assert engine.drains == [False, True]
    assert http.post("/admin/resume/0", json={}).json() == {"replica": 0, "state": "ready"}
    assert engine.kept == ["ready"], "it was waited for"
    assert error_of(http.post("/admin/resume/0", json={}), 409)["code"] == "replica_state"


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "0"}])
def test_nothing_need_be_said(engine: ScriptedClient, http: httpx.Client, headers: dict[str, str]) -> None:
    """``curl -X POST .../admin/drain/0``, as anybody would write it."""
    paths = ("/admin/drain/0", "/admin/resume/0", "/admin/rolling-restart")
    assert [http.post(path, headers=headers).status_code for path in paths] == [200, 200, 202]
    assert engine.kept == ["ready"]
    assert error_of(http.post("/admin/drain/7", headers=headers), 404)["code"] == "replica_not_found"
    assert error_of(http.post("/admin/drain/0", content=b"{}"), 415)
    # A page in a visitor's browser, which needs no leave to send this.
    for origin, status in (("https://other.example", 403), ("http://localhost:3000", 415)):
        assert error_of(http.post("/admin/drain/0", headers={**headers, "Origin": origin}), status)


def test_a_drain_tells_what_became_of_the_replica(engine: ScriptedClient, http: httpx.Client) -> None:
    engine.drained_to = "unreached"
    answer = http.post("/admin/drain/0", json={})
    assert answer.status_code == 200 and answer.json() == {"replica": 0, "state": "unreached"}
    # One that joined, and was told to end.
    engine.drained_to = "left"
    assert http.post("/admin/drain/0", json={"restart": True}).json() == {"replica": 0, "state": "left"}


def test_a_drain_that_lasts_goes_on_behind_its_answer(engine: ScriptedClient, http: httpx.Client) -> None:
    engine.drained_to = "draining"
    answer = http.post("/admin/drain/0", json={"timeout": 0.05})
    assert answer.status_code == 202 and answer.json() == {"replica": 0, "state": "draining"}
    for timeout in (0, -1, "1"):
        assert error_of(http.post("/admin/drain/0", json={"timeout": timeout}), 400)["param"] == "timeout"


def test_a_rolling_restart_is_begun_and_followed(engine: ScriptedClient, http: httpx.Client) -> None:
    path = "/admin/rolling-restart"
    none = {"state": "none", "stage": None, "current": None, "restarted": [], "left": [], "skipped": [], "error": None}
    assert http.get(path).json() == none
    begun = http.post(path, json={})
    assert begun.status_code == 202
    assert (
        begun.json()
        == http.get(path).json()
        == {**none, "state": "running", "stage": "draining", "current": 0, "left": [1]}
    )
    assert error_of(http.post(path, json={}), 409)["code"] == "replica_state"
    assert error_of(http.post(path, json={"now": True}), 400)
    stopped = http.delete(path)
    assert stopped.status_code == 200 and stopped.json() == http.get(path).json()
    assert stopped.json()["error"] == "somebody asked for it"
    assert error_of(http.delete(path), 409)["code"] == "replica_state"


def test_what_is_no_replica(http: httpx.Client) -> None:
    assert error_of(http.post("/admin/drain/7", json={}), 404)["code"] == "replica_not_found"
    assert error_of(http.post("/admin/drain/x", json={}), 400)
    assert error_of(http.post("/admin/drain/0", json={"now": True}), 400)
    assert error_of(http.get("/admin/drain/0"), 405)


@pytest.mark.parametrize("path", ["/admin/drain/0", "/admin/resume/0", "/admin/rolling-restart", "/admin/other"])
def test_it_takes_the_admin_key_or_this_machine(path: str) -> None:
    engine = ScriptedClient()
    guarded = ServerOptions(api_keys=KEYS, admin_key=ADMIN)
    assert ask(guarded, path, {}, engine=engine).status_code == 401
    assert ask(guarded, path, {}, key=KEYS[0], engine=engine).status_code == 403
    assert ask(ServerOptions(), path, {}, peer=REMOTE, engine=engine).status_code == 403
    assert engine.drains == [] and engine.rolling.view().state == "none"
    assert ask(guarded, "/admin/drain/0", {}, key=ADMIN, peer=REMOTE, engine=engine).status_code == 200


def test_ready_while_enough_replicas_serve_everything(
    engine: ScriptedClient, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"status": "ok", "replicas": {"0": "ready"}, "refused": {}, "missing": [], "not_served": []}
    assert http.get("/health").json() == told
    assert http.get("/ready").json() == {**told, "serving": 1, "of": 1}
    assert error_of(http.get("/ready?replicas=2"), 503)["message"] == "1 of 1 replicas serve, 2 asked for."
    assert error_of(http.get("/ready?replicas=0"), 400)
    [view] = engine.replicas()
    views: list[Any] = [view, replace(view, replica_id=1, state="starting")]
    monkeypatch.setattr(engine, "replicas", lambda: views)
    assert http.get("/health").json()["replicas"] == {"0": "ready", "1": "starting"}
    answer = http.get("/ready").json()
    assert (answer["serving"], answer["of"], answer["replicas"]) == (1, 2, {"0": "ready", "1": "starting"})
    error = error_of(http.get("/ready?replicas=2"), 503)
    assert error["message"] == "1 of 2 replicas serve, 2 asked for: replica 1 is starting."
    views[:] = [
        replace(view, state="draining"),
        replace(view, replica_id=1, coming=frozenset({"hash-sql", "hash-json"})),
    ]
    error = error_of(http.get("/ready"), 503)
    assert error["code"] == "not_ready"
    assert error["message"].endswith("replica 0 is draining, replica 1 waits for 2 adapters.")


def test_whoever_asks_for_warm_replicas_waits_for_those_that_compile_and_capture(
    engine: ScriptedClient, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    [view] = engine.replicas()
    views: list[Any] = [replace(view, is_warm=False), replace(view, replica_id=1, is_warm=True)]
    monkeypatch.setattr(engine, "replicas", lambda: views)
    assert http.get("/ready?replicas=2").status_code == 200
    assert http.get("/ready?warm=true").json()["serving"] == 1
    error = error_of(http.get("/ready?warm=true&replicas=2"), 503)
    assert error["message"] == "1 of 2 replicas serve, 2 asked for: replica 0 warms up."
    views[0] = replace(view, is_warm=True)
    assert http.get("/ready?warm=true&replicas=2").status_code == 200
    assert error_of(http.get("/ready?warm=perhaps"), 400)


def test_adapters_that_replicas_refused_are_told_and_those_that_nobody_holds_are_missing(
    engine: ScriptedClient, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    [view] = engine.replicas()
    refused = {"hash-sql": "/secret/path is damaged", "hash-unloaded": "it is damaged"}
    views: list[Any] = [replace(view, refused=refused), replace(view, replica_id=1)]
    monkeypatch.setattr(engine, "replicas", lambda: views)
    told = {
        "status": "degraded",
        "replicas": {"0": "ready", "1": "ready"},
        "refused": {"0": ["sql"]},
        "missing": [],
        "not_served": [],
    }
    assert http.get("/health").json() == told
    # The other one has it: nobody is refused, and a probe stays content.
    assert http.get("/ready").json() == http.get("/ready?adapters=all").json() == {**told, "serving": 1, "of": 2}
    error = error_of(http.get("/ready?replicas=2"), 503)
    assert error["message"] == "1 of 2 replicas serve, 2 asked for: replica 0 refused 'sql'."
    # Each replica lacks something, and together they have all but one adapter.
    views[1] = replace(views[1], refused={"hash-json": "it is damaged", "hash-sql": "it is damaged"})
    assert http.get("/health").json() | {"refused": 0} == {**told, "refused": 0, "missing": ["sql"]}
    answer = http.get("/ready")
    assert (answer.status_code, answer.json()["missing"], answer.json()["serving"]) == (200, ["sql"], 0)
    assert answer.json()["refused"] == {"0": ["sql"], "1": ["sql", "json"]} and "secret" not in answer.text
    error = error_of(http.get("/ready?adapters=all"), 503)
    assert error["code"] == "not_ready" and error["message"].startswith("No replica serves 'sql': ")
    assert error_of(http.get("/ready?adapters=some"), 400)
    # Whoever drains or is dead helps nobody.
    views[:] = [replace(view, refused=refused), replace(view, replica_id=1, state="draining")]
    assert http.get("/ready").json()["missing"] == ["sql"]
