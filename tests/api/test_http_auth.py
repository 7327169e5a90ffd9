"""Who may call what."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from peft_dist.api.auth import ADMIN_PATHS, is_local_client
from peft_dist.api.options import ServerOptions
from peft_dist.api.server import build_app
from peft_dist.core.errors import ConfigError
from tests.api.http_support import BASE, TOKENIZER, ScriptedClient, serving

KEYS = ("key-one", "key-two-longer")
ADMIN = "admin-secret"
LOAD = {"lora_name": "new", "lora_path": "new"}
COMPLETION = {"model": BASE, "prompt": "x", "max_tokens": 1}
LOCAL, REMOTE, MAPPED = ("127.0.0.1", 5), ("192.0.2.7", 5), ("::ffff:127.0.0.1", 5)


def ask(
    options: ServerOptions,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    key: str | None = None,
    peer: tuple[str, int] = LOCAL,
    headers: dict[str, str] | None = None,
    engine: ScriptedClient | None = None,
) -> httpx.Response:
    """One request that seems to come from ``peer``."""
    app = build_app(engine or ScriptedClient(), TOKENIZER, options)

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, client=peer)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            sent = {"Authorization": f"Bearer {key}"} if key else {}
            method = "GET" if body is None else "POST"
            return await client.request(method, path, json=body, headers={**sent, **(headers or {})})

    return asyncio.run(go())


@pytest.mark.parametrize("key", KEYS)
def test_any_api_key_opens_v1(key: str) -> None:
    assert ask(ServerOptions(api_keys=KEYS), "/v1/models", key=key).status_code == 200
    assert ask(ServerOptions(api_keys=KEYS), "/v1/completions", COMPLETION, key=key).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/sql", "/v1/nothing", "/v1", "/v1/completions", "/tokenize", "/detokenize"]
)
@pytest.mark.parametrize("key", [None, "wrong", "key-on", "key-one1", "kéy"])
def test_without_the_key_nothing_of_v1_answers(path: str, key: str | None) -> None:
    headers = {"Authorization": f"Bearer {key}".encode()} if key else {}
    response = ask(ServerOptions(api_keys=KEYS), path, headers=headers)  # type: ignore[arg-type]
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"
    assert "key-one" not in response.text


@pytest.mark.parametrize("value", ["key-one", "Basic key-one", "Bearer", "Bearer  ", "Bearer key-one key-one"])
def test_other_ways_to_write_the_header(value: str) -> None:
    assert ask(ServerOptions(api_keys=KEYS), "/v1/models", headers={"Authorization": value}).status_code == 401


def test_bearer_in_any_case() -> None:
    headers = {"Authorization": "bearer key-one"}
    assert ask(ServerOptions(api_keys=KEYS), "/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("key", ["clé-voilà", "ключ", "鍵\u0085", "\udcff\udca0"])
def test_keys_beyond_ascii(key: str) -> None:
    """An "à" ends in a byte that Latin-1 takes for a space; the last key came as bytes that are not UTF-8."""
    options = ServerOptions(api_keys=("other", key))
    sent = key.encode("utf-8", "surrogateescape")
    for token, status in ((sent, 200), (sent[:-1], 401), (sent + b"\xa0", 401)):
        headers: Any = {b"Authorization": b"Bearer " + token}
        assert ask(options, "/v1/models", headers=headers).status_code == status


def test_the_key_comes_before_the_body() -> None:
    response = ask(ServerOptions(api_keys=KEYS, max_body_bytes=10), "/v1/completions", COMPLETION)
    assert response.status_code == 401


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics", "/docs", "/openapi.json"])
def test_open_routes(path: str) -> None:
    assert ask(ServerOptions(api_keys=KEYS, admin_key=ADMIN), path, peer=REMOTE).status_code == 200


def test_without_keys_v1_is_open() -> None:
    assert ask(ServerOptions(), "/v1/models", peer=REMOTE).status_code == 200


@pytest.mark.parametrize("path", sorted(ADMIN_PATHS))
@pytest.mark.parametrize("peer", [LOCAL, REMOTE])
def test_admin_key(path: str, peer: tuple[str, int]) -> None:
    options = ServerOptions(api_keys=KEYS, admin_key=ADMIN)
    body = {"lora_name": "sql", "lora_path": "x", "load_inplace": True}
    assert ask(options, path, body, key=ADMIN, peer=peer).status_code == 200
    assert ask(options, path, body, peer=peer).status_code == 401
    assert ask(options, path, body, key="wrong", peer=peer).status_code == 401
    refused = ask(options, path, body, key=KEYS[0], peer=peer)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_only")


def test_the_admin_key_opens_the_rest_too() -> None:
    options = ServerOptions(api_keys=KEYS, admin_key=ADMIN)
    assert ask(options, "/v1/models", key=ADMIN, peer=REMOTE).status_code == 200
    alone = ServerOptions(admin_key=ADMIN)
    assert ask(alone, "/v1/models", peer=REMOTE).status_code == 200
    assert ask(alone, "/v1/load_lora_adapter", LOAD, peer=LOCAL).status_code == 401


@pytest.mark.parametrize("path", sorted(ADMIN_PATHS))
def test_without_an_admin_key_only_this_machine_loads(path: str) -> None:
    body = {"lora_name": "sql", "lora_path": "x", "load_inplace": True}
    for peer in (LOCAL, MAPPED, ("::1", 5), ("127.8.8.8", 5)):
        assert ask(ServerOptions(), path, body, peer=peer).status_code == 200
    for peer in (REMOTE, ("::ffff:192.0.2.7", 5), ("2001:db8::1", 5), ("localhost.example", 5)):
        engine = ScriptedClient()
        response = ask(ServerOptions(), path, body, peer=peer, engine=engine)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "admin_only")
        assert "--admin-key" in response.json()["error"]["message"]
        assert list(engine.loaded) == ["sql", "json"] and not engine.load_calls


def test_without_an_admin_key_the_api_key_is_still_needed() -> None:
    options = ServerOptions(api_keys=KEYS)
    assert ask(options, "/v1/load_lora_adapter", LOAD).status_code == 401
    assert ask(options, "/v1/load_lora_adapter", LOAD, key=KEYS[1]).status_code == 200
    assert ask(options, "/v1/load_lora_adapter", LOAD, key=KEYS[1], peer=REMOTE).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Forwarded-For": "127.0.0.1"},
        {"X-Real-IP": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
)
def test_headers_never_make_a_client_local(headers: dict[str, str]) -> None:
    for peer in (LOCAL, REMOTE):
        response = ask(ServerOptions(), "/v1/load_lora_adapter", LOAD, peer=peer, headers=headers)
        assert response.status_code == 403


def test_a_page_of_this_machine_is_local() -> None:
    headers = {"Origin": "http://localhost:3000"}
    assert ask(ServerOptions(), "/v1/load_lora_adapter", LOAD, headers=headers).status_code == 200


def test_a_connection_without_an_address_is_not_local() -> None:
    assert not is_local_client({"type": "http", "headers": [], "client": None})


def test_keys_are_not_logged_or_shown(engine: ScriptedClient, caplog: pytest.LogCaptureFixture) -> None:
    options = ServerOptions(api_keys=KEYS, admin_key=ADMIN)
    with caplog.at_level(logging.DEBUG), serving(engine, options) as url:
        for key in (KEYS[0], ADMIN, "wrong-key"):
            httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
        shown = caplog.text + repr(options) + httpx.get(f"{url}/metrics").text
    assert not any(key in shown for key in (*KEYS, ADMIN, "wrong-key"))


def test_the_openai_clients_key(engine: ScriptedClient) -> None:
    with serving(engine, ServerOptions(api_keys=KEYS)) as url:
        assert openai.OpenAI(base_url=f"{url}/v1", api_key=KEYS[1], max_retries=0).models.list().data
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()


@pytest.mark.parametrize(
    "options", [{"api_keys": ("",)}, {"admin_key": ""}, {"adapter_dir": Path("missing-folder")}, {"max_body_bytes": 0}]
)
def test_options_that_cannot_be_meant(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ServerOptions(**options)
