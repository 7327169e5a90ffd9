"""Whatever JSON comes in, the answer is a result or a clear refusal, never a 500, and the server goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from peft_dist.api.protocol_adapters import LoadAdapterRequest
from peft_dist.api.protocol_chat import ChatCompletionRequest
from peft_dist.api.protocol_completions import CompletionRequest
from peft_dist.api.protocol_token_ids import DetokenizeRequest, TokenizeRequest
from tests.api.http_support import BASE, ScriptedClient, serving

# Lone surrogates included: JSON can write them, UTF-8 cannot.
texts = st.text(st.characters(), max_size=12) | st.sampled_from([BASE, "sql", "user", "text", "hello", "\ud800", "\0"])
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308, 5e-324])
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=8
)
parts = st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]) | values, "text": texts | values})
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "developer", "tool"]) | values},
    optional={"content": texts | st.lists(parts, max_size=2) | values, "name": values, "tool_calls": values},
)
CASES: dict[str, tuple[type[Any], dict[str, Any], dict[str, st.SearchStrategy[Any]]]] = {
    "/v1/completions": (
        CompletionRequest,
        {"model": BASE, "prompt": "hello", "max_tokens": 3},
        {"prompt": texts | st.lists(st.integers(-1, 310) | texts, max_size=4) | values},
    ),
    "/v1/chat/completions": (
        ChatCompletionRequest,
        {"model": BASE, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
        {"messages": st.lists(messages, max_size=3) | values, "chat_template_kwargs": st.dictionaries(texts, values)},
    ),
    "/tokenize": (
        TokenizeRequest,
        {"model": BASE, "messages": [{"role": "user", "content": "hello"}]},
        {"messages": st.lists(messages, max_size=3) | values, "chat_template_kwargs": st.dictionaries(texts, values)},
    ),
    "/detokenize": (
        DetokenizeRequest,
        {"model": BASE, "tokens": [5]},
        {"tokens": st.lists(st.integers(-1, 310), max_size=4) | values},
    ),
    "/v1/load_lora_adapter": (LoadAdapterRequest, {"lora_name": "new", "lora_path": "x", "load_inplace": True}, {}),
}
REFUSED = ["tools", "response_format", "best_of", "guided_json", "nobody_knows_this"]


def bodies(route: str) -> st.SearchStrategy[Any]:
    """A good body in which some fields hold anything."""
    model, good, special = CASES[route]
    fields = {name: special.get(name, values) for name in [*model.model_fields, *REFUSED]}
    changed = st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in names})
    )
    return changed.map(lambda change: {**good, **change}) | values


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with serving(ScriptedClient()) as url, httpx.Client(base_url=url, timeout=100) as client:
        yield client


@pytest.mark.parametrize("route", CASES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_json(http: httpx.Client, route: str, data: st.DataObject) -> None:
    body = data.draw(bodies(route))
    check(http.post(route, content=json.dumps(body), headers={"Content-Type": "application/json"}))
    assert http.get("/health").status_code == 200


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
@example(content=b'{"model":"a","model":"b"}')
@example(content=b'{"a":' * 4000)
@example(content=b'{"seed":' + b"9" * 5000 + b"}")
@example(content="{}".encode("utf-16"))
def test_any_bytes(http: httpx.Client, content: bytes) -> None:
    check(http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"}))


@pytest.mark.parametrize("kwargs", [{"\ud800": 1}, {"suffix_note": "\ud800"}, {"messages": 1}, {"raise_exception": 1}])
def test_odd_template_variables(http: httpx.Client, kwargs: dict[str, Any]) -> None:
    body = json.dumps({**CASES["/v1/chat/completions"][1], "chat_template_kwargs": kwargs})
    check(http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}))


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
