"""Adapters that come and go while the server runs, and the routes that list and watch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import peft_dist
from peft_dist.api.options import ServerOptions
from tests.api.http_support import BASE, MAX_MODEL_LEN, ScriptedClient, serving

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def test_load_use_and_unload(http: httpx.Client, api: openai.OpenAI, engine: ScriptedClient) -> None:
    response = http.post(LOAD, json={"lora_name": "new", "lora_path": "/some/where"})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert response.headers["content-type"].startswith("text/plain")
    assert api.completions.create(model="new", prompt="x", max_tokens=30).choices[0].text == "I am new"
    response = http.post(UNLOAD, json={"lora_name": "new"})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    with pytest.raises(openai.NotFoundError):
        api.completions.create(model="new", prompt="x")
    assert list(engine.loaded) == ["sql", "json"]


def test_loads_and_unloads_are_logged(http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "peft_dist.serve")
    http.post("/v1/load_lora_adapter", json={"lora_name": "new", "lora_path": "/adapters/new"})
    http.post("/v1/unload_lora_adapter", json={"lora_name": "new"})
    texts = [record.getMessage() for record in caplog.records if record.name == "peft_dist.serve"]
    assert len(texts) == 2 and texts[0].startswith("Adapter 'new' (rank ") and texts[0].endswith("from /adapters/new")
    assert texts[1] == "Adapter 'new' is unloaded"


def test_by_default_nothing_is_fetched_or_unpickled(http: httpx.Client, engine: ScriptedClient) -> None:
    http.post(LOAD, json={"lora_name": "new", "lora_path": "org/name@main"})
    assert engine.load_calls == [
        {
            "name": "new",
            "path": "org/name@main",
            "replace": False,
            "allow_hub": False,
            "root": None,
            "allow_pickle": False,
            "pinned": None,
        }
    ]


def test_the_operators_options_bound_every_load(engine: ScriptedClient, tmp_path: Path) -> None:
    options = ServerOptions(adapter_dir=tmp_path, allow_hub_load=True, allow_pickle=True)
    with serving(engine, options) as url:
        body = {"lora_name": "sql", "lora_path": "x", "load_inplace": True, "root": "/", "allow_hub": False}
        assert httpx.post(url + LOAD, json=body).status_code == 200
    (call,) = engine.load_calls
    assert (call["root"], call["allow_hub"], call["allow_pickle"]) == (str(tmp_path), True, True)
    assert call["replace"] is True


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "x"}, "lora_name"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": 5, "lora_path": "x"}, "lora_name"),
        ({"lora_name": "", "lora_path": "x"}, "lora_name"),
        ({"lora_name": "a\nb", "lora_path": "x"}, "lora_name"),
        ({"lora_name": "x" * 2000, "lora_path": "x"}, "lora_name"),
        ({"lora_name": "new", "lora_path": ""}, "lora_path"),
        ({"lora_name": "new", "lora_path": "a\0b"}, "lora_path"),
        ({"lora_name": "new", "lora_path": "x", "load_inplace": "yes"}, "load_inplace"),
        ({"lora_name": "new", "lora_path": "x", "pinned": 1}, "pinned"),
        ({"lora_name": "new", "lora_path": "x", "trust_remote_code": True}, "trust_remote_code"),
        ({"lora_name": "new", "lora_path": "x", "is_3d_lora_weight": True}, "is_3d_lora_weight"),
        ({"lora_name": "sql", "lora_path": "x"}, "lora_name"),
        ({"lora_name": BASE, "lora_path": "x", "load_inplace": True}, "lora_name"),
        ({"lora_name": f"{BASE}:sql", "lora_path": "x"}, "lora_name"),
        ({"lora_name": " new", "lora_path": "x"}, "lora_name"),
        ({"lora_name": "new", "lora_path": "broken"}, "lora_path"),
    ],
)
def test_loads_that_are_refused(http: httpx.Client, engine: ScriptedClient, body: dict[str, Any], param: str) -> None:
    response = http.post(LOAD, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert list(engine.loaded) == ["sql", "json"]
    assert httpx.post(f"{http.base_url}/v1/completions", json={"model": "sql", "prompt": "x"}).status_code == 200


def test_a_duplicate_names_the_remedy(http: httpx.Client) -> None:
    error = http.post(LOAD, json={"lora_name": "sql", "lora_path": "x"}).json()["error"]
    assert "has already been loaded" in error["message"] and "load_inplace" in error["message"]


def test_the_reason_of_a_refusal_is_passed_on(http: httpx.Client) -> None:
    error = http.post(LOAD, json={"lora_name": "new", "lora_path": "broken"}).json()["error"]
    assert "truncated" in error["message"] and error["code"] == "adapter_refused"


def test_unloading_what_is_not_there(http: httpx.Client) -> None:
    response = http.post(UNLOAD, json={"lora_name": "nobody"})
    assert response.status_code == 404
    assert (response.json()["error"]["param"], response.json()["error"]["code"]) == ("lora_name", "adapter_not_found")
    assert http.post(UNLOAD, json={}).json()["error"]["param"] == "lora_name"


def test_loading_into_a_dead_engine(http: httpx.Client, engine: ScriptedClient) -> None:
    engine.health_error = "the worker was killed"
    assert http.post(LOAD, json={"lora_name": "new", "lora_path": "x"}).status_code == 503


def test_models(api: openai.OpenAI) -> None:
    base, sql, json_adapter = api.models.list().data
    assert (base.id, base.root, base.parent) == (BASE, "org/tiny-base", None)  # type: ignore[attr-defined]
    assert (sql.id, sql.root, sql.parent) == ("sql", "/adapters/sql", BASE)  # type: ignore[attr-defined]
    assert json_adapter.id == "json"
    for model in (base, sql, json_adapter):
        assert (model.object, model.owned_by) == ("model", "peft_dist")
        assert model.max_model_len == MAX_MODEL_LEN  # type: ignore[attr-defined]
        assert model.created > 0


def test_a_pin_is_passed_on_and_listed(http: httpx.Client, engine: ScriptedClient) -> None:
    assert http.post(LOAD, json={"lora_name": "new", "lora_path": "x", "pinned": True}).status_code == 200
    body = {"lora_name": "sql", "lora_path": "x", "load_inplace": True, "pinned": False}
    assert http.post(LOAD, json=body).status_code == 200
    assert [call["pinned"] for call in engine.load_calls] == [True, False]
    base, *adapters = http.get("/v1/models").json()["data"]
    assert "pinned" not in base
    assert {card["id"]: card["pinned"] for card in adapters} == {"sql": False, "json": False, "new": True}
    assert "peft_dist:adapters_pinned 1.0" in http.get("/metrics").text


def test_one_model(api: openai.OpenAI, http: httpx.Client) -> None:
    assert api.models.retrieve("sql").parent == BASE  # type: ignore[attr-defined]
    http.post(LOAD, json={"lora_name": "org/new", "lora_path": "x"})
    assert http.get("/v1/models/org/new").json()["id"] == "org/new"
    # Whatever a request may name can be looked up.
    both = http.get(f"/v1/models/{BASE}:sql").json()
    assert both == {**http.get("/v1/models/sql").json(), "id": f"{BASE}:sql"}
    with pytest.raises(openai.NotFoundError) as missing:
        api.models.retrieve("nobody")
    assert missing.value.code == "model_not_found"


def test_further_names_of_the_base(engine: ScriptedClient) -> None:
    with serving(engine, ServerOptions(served_names=("alias", "org/alias"))) as url:
        assert [card["id"] for card in httpx.get(f"{url}/v1/models").json()["data"]][:3] == [BASE, "alias", "org/alias"]
        for model, text in (("alias", "hello"), ("org/alias:sql", "SELECT"), ("alias:json", '{"a"')):
            body = {"model": model, "prompt": "x", "max_tokens": 6}
            answer = httpx.post(f"{url}/v1/completions", json=body).json()
            assert answer["choices"][0]["text"].startswith(text) and answer["model"] == model
        for unknown in ("alias:nobody", "aliassql"):
            body = {"model": unknown, "prompt": "x"}
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == 404
        assert httpx.post(url + LOAD, json={"lora_name": "alias", "lora_path": "x"}).status_code == 400


def test_health_and_version(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/version").json() == {"version": peft_dist.__version__}


def test_openapi_document(http: httpx.Client) -> None:
    assert "swagger" in http.get("/docs").text
    document = http.get("/openapi.json").json()
    routes = {"/v1/completions", "/v1/chat/completions", "/v1/models", LOAD, UNLOAD, "/health", "/version"}
    assert routes <= set(document["paths"])
    assert "logit_bias" in document["components"]["schemas"]["CompletionRequest"]["properties"]
    assert set(document["paths"]["/v1/completions"]["post"]["responses"]) == {"200", "4XX", "5XX"}
