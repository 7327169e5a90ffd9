"""``/tokenize`` and ``/detokenize``: the ids that a prompt would be, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from peft_dist.api.options import ServerOptions
from scripts.demo_model import MODEL_FOLDER, cache_root, is_complete
from tests.api.http_support import (
    BASE,
    CHAT,
    COMPLETIONS,
    EOS,
    MAX_MODEL_LEN,
    PADDED_VOCAB,
    TOKENIZER,
    ScriptedClient,
    encode,
    error_of,
    serving,
)
from tests.api.metrics_support import Scrape

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello w"}]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def tokens_of(http: httpx.Client, **body: Any) -> list[int]:
    response = http.post(TOKENIZE, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert list(answer) == ["count", "max_model_len", "tokens", "token_strs"]
    assert answer["count"] == len(answer["tokens"])
    found: list[int] = answer["tokens"]
    return found


@lru_cache
def smollm2() -> Any:
    folder = cache_root() / MODEL_FOLDER
    if not is_complete(folder):
        pytest.skip("the demo model is not in the cache (make demo puts it there)")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def real() -> Iterator[httpx.Client]:
    """A server with SmolLM2's tokenizer and chat template."""
    engine, tokenizer = ScriptedClient(), smollm2()
    engine.model = dataclasses.replace(engine.model, vocab_size=len(tokenizer))
    with serving(engine, tokenizer=tokenizer) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def test_a_prompt(shared: httpx.Client) -> None:
    answer = shared.post(TOKENIZE, json={"model": BASE, "prompt": "hello wö"}).json()
    ids = [TOKENIZER.bos_token_id, *encode("hello wö")]
    assert answer == {"count": len(ids), "max_model_len": MAX_MODEL_LEN, "tokens": ids, "token_strs": None}


def test_special_tokens_and_pieces(shared: httpx.Client) -> None:
    body = {"prompt": "hello wö", "add_special_tokens": False, "return_token_strs": True}
    answer = shared.post(TOKENIZE, json=body).json()
    assert answer["tokens"] == encode("hello wö")
    assert answer["token_strs"] == ["hello", "Ġw", "Ã", "¶"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "hello"},
        {"prompt": "hello", "add_special_tokens": False},
        {"messages": TALK},
        {"messages": TALK, "add_special_tokens": True},
        {"messages": TALK, "add_generation_prompt": False},
        {"messages": TALK, "continue_final_message": True},
        {"messages": TALK, "chat_template_kwargs": {"suffix_note": "!"}},
    ],
)
def test_the_ids_are_those_that_the_model_gets(http: httpx.Client, engine: ScriptedClient, body: Any) -> None:
    """Also where the whole body is sent, with what says how to answer."""
    whole = {"model": "sql", "max_tokens": 3, "temperature": 0, "stream": False, **body}
    assert http.post(COMPLETIONS if "prompt" in body else CHAT, json=whole).status_code == 200
    assert tokens_of(http, **whole) == engine.requests[0][0]


def test_the_operators_template(engine: ScriptedClient) -> None:
    options = ServerOptions(chat_template="{{ messages[0].content }}!")
    with serving(engine, options) as url, httpx.Client(base_url=url) as http:
        assert tokens_of(http, messages=TALK) == encode("hello!")


def test_more_than_the_model_takes_is_counted(shared: httpx.Client) -> None:
    assert len(tokens_of(shared, prompt="a" * (MAX_MODEL_LEN + 5), add_special_tokens=False)) == MAX_MODEL_LEN + 5


def test_long_texts_are_read_in_a_thread(engine: ScriptedClient) -> None:
    with serving(engine, ServerOptions(tokenize_in_thread_chars=1)) as url, httpx.Client(base_url=url) as http:
        ids = tokens_of(http, prompt="hello w", add_special_tokens=False)
        assert http.post(DETOKENIZE, json={"tokens": ids}).json() == {"prompt": "hello w"}


def test_text_of_ids(shared: httpx.Client) -> None:
    ids = [TOKENIZER.bos_token_id, *encode("naïve 😀"), EOS]
    assert shared.post(DETOKENIZE, json={"model": "sql", "tokens": ids}).json() == {"prompt": "<|bos|>naïve 😀<|eos|>"}
    assert shared.post(DETOKENIZE, json={"tokens": []}).json() == {"prompt": ""}
    # Ids that only the model's padded vocabulary has.
    assert shared.post(DETOKENIZE, json={"tokens": [*encode("a"), PADDED_VOCAB - 1]}).json() == {"prompt": "a"}


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        (TOKENIZE, {}, "prompt"),
        (TOKENIZE, {"prompt": None, "messages": None}, "prompt"),
        (TOKENIZE, {"prompt": "a", "messages": TALK}, "prompt"),
        (TOKENIZE, {"prompt": 5}, "prompt"),
        (TOKENIZE, {"prompt": ["a"]}, "prompt"),
        (TOKENIZE, {"prompt": "a", "model": 5}, "model"),
        (TOKENIZE, {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        (TOKENIZE, {"prompt": "a", "return_token_strs": "yes"}, "return_token_strs"),
        (TOKENIZE, {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        (TOKENIZE, {"prompt": "a", "continue_final_message": False}, "continue_final_message"),
        (TOKENIZE, {"prompt": "a", "chat_template_kwargs": {}}, "chat_template_kwargs"),
        (TOKENIZE, {"messages": []}, "messages"),
        (TOKENIZE, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        (TOKENIZE, {"messages": [{"role": "user", "content": "forbidden"}]}, "messages"),
        (TOKENIZE, {"messages": [{**TALK[1], "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
        (
            TOKENIZE,
            {"messages": TALK, "add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
        ),
        (TOKENIZE, {"messages": TALK, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        (TOKENIZE, {"messages": TALK, "chat_template": "{{ 1 }}"}, "chat_template"),
        (TOKENIZE, {"messages": TALK, "tools": [{"type": "function"}]}, "tools"),
        (TOKENIZE, {"prompt": "x", "tools": []}, "tools"),
        (TOKENIZE, {"messages": TALK, "mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
        (TOKENIZE, {"prompt": "a", "lora_name": "sql"}, "lora_name"),
        (TOKENIZE, {"prompt": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        (DETOKENIZE, {}, "tokens"),
        (DETOKENIZE, {"tokens": "a"}, "tokens"),
        (DETOKENIZE, {"tokens": [1.5]}, "tokens"),
        (DETOKENIZE, {"tokens": [True]}, "tokens"),
        (DETOKENIZE, {"tokens": [-1]}, "tokens"),
        (DETOKENIZE, {"tokens": [PADDED_VOCAB]}, "tokens"),
        (DETOKENIZE, {"tokens": [2**70]}, "tokens"),
        (DETOKENIZE, {"tokens": [5], "adapter_id": "sql"}, "adapter_id"),
    ],
)
def test_wrong_values_are_named(shared: httpx.Client, route: str, body: Any, param: str) -> None:
    error = error_of(shared.post(route, json=body), 400)
    assert error["param"] == param and param in error["message"]


def test_half_of_a_surrogate_pair(shared: httpx.Client) -> None:
    response = shared.post(TOKENIZE, content=b'{"prompt": "\\ud800"}', headers={"Content-Type": "application/json"})
    assert error_of(response, 400)["param"] == "prompt"


def test_half_of_a_surrogate_pair_as_a_field(shared: httpx.Client) -> None:
    body = b'{"prompt": "a", "\\ud800": 1}'
    error = error_of(shared.post(TOKENIZE, content=body, headers={"Content-Type": "application/json"}), 400)
    assert "must be a JSON object" not in error["message"] and "not valid" in error["message"]


@pytest.mark.parametrize(("route", "body"), [(TOKENIZE, {"prompt": "a"}), (DETOKENIZE, {"tokens": [5]})])
def test_names_that_are_not_served(shared: httpx.Client, route: str, body: Any) -> None:
    for name in ("sql", f"{BASE}:json", BASE, None):
        assert shared.post(route, json={**body, "model": name}).status_code == 200
    error = error_of(shared.post(route, json={**body, "model": "nobody"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        (TOKENIZE, {"prompt": "a"}, "prompt"),
        (TOKENIZE, {"messages": TALK}, "messages"),
        (DETOKENIZE, {"tokens": [5]}, "tokens"),
    ],
)
def test_no_tokenizer(engine: ScriptedClient, route: str, body: Any, param: str) -> None:
    with serving(engine, tokenizer=None) as url, httpx.Client(base_url=url) as http:
        error = error_of(http.post(route, json=body), 400)
        assert error["param"] == param and "no tokenizer" in error["message"]


def test_the_key_is_asked_for(engine: ScriptedClient) -> None:
    with serving(engine, ServerOptions(api_keys=("key",))) as url, httpx.Client(base_url=url) as http:
        error_of(http.post(TOKENIZE, json={"prompt": "a"}), 401)
        error_of(http.post(DETOKENIZE, json={"tokens": [5]}), 401)
        sent = {"Authorization": "Bearer key"}
        assert http.post(TOKENIZE, json={"prompt": "a"}, headers=sent).status_code == 200
        assert http.post(DETOKENIZE, json={"tokens": [5]}, headers=sent).status_code == 200


def test_no_replica_is_asked_and_errors_are_counted(http: httpx.Client, engine: ScriptedClient) -> None:
    engine.health_error = "the replica died"
    assert tokens_of(http, prompt="a")
    error_of(http.post(TOKENIZE, json={}), 400)
    error_of(http.post(DETOKENIZE, json={"tokens": [-1]}), 400)
    assert Scrape.of(http).by("peft_dist:request_errors_total", "code") == {("400",): 2}
    assert not engine.requests


@settings(max_examples=30, deadline=None)
@given(text=texts, special=st.booleans())
def test_smollm2s_texts(real: httpx.Client, text: str, special: bool) -> None:
    ids = tokens_of(real, prompt=text, add_special_tokens=special)
    assert ids == smollm2()(text, add_special_tokens=special)["input_ids"]
    assert real.post(DETOKENIZE, json={"tokens": ids}).json() == {"prompt": smollm2().decode(ids)}
    asked = real.post(TOKENIZE, json={"prompt": text, "add_special_tokens": special, "return_token_strs": True})
    assert asked.json()["token_strs"] == smollm2().convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    "writing", [{}, {"add_generation_prompt": False}, {"add_generation_prompt": False, "continue_final_message": True}]
)
def test_smollm2s_conversations(real: httpx.Client, writing: dict[str, bool]) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *TALK]
    expected = smollm2().apply_chat_template(messages, **{"add_generation_prompt": True, **writing})
    ids = expected if isinstance(expected, list) else expected["input_ids"]
    assert tokens_of(real, messages=messages, **writing) == ids
