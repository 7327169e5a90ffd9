"""Every field of a body: wrong values are refused by name, what is not implemented too, the unknown is ignored."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from peft_dist.api import unimplemented
from peft_dist.api.unimplemented import refuse_in_chat, refuse_in_completion
from tests.api.http_support import BASE, BODIES, CHAT, COMPLETIONS, PADDED_VOCAB, ScriptedClient, error_of

SHARED_FIELDS: list[tuple[str, Any]] = [
    ("model", None),
    ("model", 3),
    ("n", 0),
    ("n", 129),
    ("n", True),
    ("n", 1.5),
    ("n", "2"),
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 2.5),
    ("top_k", 2**70),
    ("min_p", -0.5),
    ("min_p", 2),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("repetition_penalty", 0),
    ("logit_bias", [1]),
    ("logit_bias", {"a": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": True}),
    ("logit_bias", {str(PADDED_VOCAB): 1}),
    ("seed", 1.5),
    ("seed", 2**64),
    ("max_tokens", -1),
    ("max_tokens", "4"),
    ("min_tokens", 5),
    ("min_tokens", -1),
    ("stop", 7),
    ("stop", [""]),
    ("stop", ["a", None]),
    ("stop", ["a"] * 17),
    ("stop_token_ids", [PADDED_VOCAB]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", "a"),
    ("ignore_eos", 1),
    ("skip_special_tokens", "yes"),
    ("include_stop_str_in_output", 0),
    ("prompt_logprobs", 21),
    ("prompt_logprobs", -1),
    ("stream", "true"),
    ("stream_options", {"include_usage": True}),
    ("return_token_ids", 1),
    ("user", 5),
]
COMPLETION_FIELDS: list[tuple[str, Any]] = [
    ("prompt", None),
    ("prompt", 5),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", ["a", 5]),
    ("prompt", [1, True]),
    ("prompt", [1.0]),
    ("prompt", [[1, "a"]]),
    ("prompt", [[["a"]]]),
    ("prompt", [-1]),
    ("prompt", [PADDED_VOCAB]),
    ("prompt", [2**80]),
    ("echo", "no"),
    ("logprobs", 21),
    ("logprobs", True),
]
CHAT_FIELDS: list[tuple[str, Any]] = [
    ("messages", None),
    ("messages", []),
    ("messages", "hello"),
    ("logprobs", 1),
    ("top_logprobs", 2),
    ("top_logprobs", 21),
    ("max_completion_tokens", -1),
    ("add_generation_prompt", "x"),
    ("chat_template_kwargs", []),
    ("chat_template_kwargs", {"tokenize": True}),
    ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}),
]


@pytest.mark.parametrize(
    ("route", "field", "value"),
    [(route, *case) for route in BODIES for case in SHARED_FIELDS]
    + [(COMPLETIONS, *case) for case in COMPLETION_FIELDS]
    + [(CHAT, *case) for case in CHAT_FIELDS],
)
def test_wrong_values_are_named(
    shared: httpx.Client, shared_engine: ScriptedClient, route: str, field: str, value: Any
) -> None:
    before = len(shared_engine.requests)
    # httpx refuses NaN, Python's json does not.
    body = json.dumps({**BODIES[route], field: value})
    response = shared.post(route, content=body, headers={"Content-Type": "application/json"})
    error = error_of(response, 400)
    assert error["param"] == field
    assert field in error["message"]
    assert error["type"] == "invalid_request_error"
    assert len(shared_engine.requests) == before, "a refused request reached the engine"


@pytest.mark.parametrize(("route", "field"), [(COMPLETIONS, "prompt"), (CHAT, "messages"), (CHAT, "model")])
def test_missing_fields_are_named(shared: httpx.Client, route: str, field: str) -> None:
    body = {name: value for name, value in BODIES[route].items() if name != field}
    assert error_of(shared.post(route, json=body), 400)["param"] == field


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "wizard", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content"),
        ({"role": "user", "content": [5]}, "messages[0].content"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls[0].function"),
        ("hello", "messages[0]"),
        ({"role": "user", "content": "forbidden"}, "messages"),
    ],
)
def test_wrong_messages(shared: httpx.Client, message: Any, param: str) -> None:
    error = error_of(shared.post(CHAT, json={"model": BASE, "messages": [message]}), 400)
    assert error["param"] == param


def test_the_templates_own_words_are_passed_on(shared: httpx.Client) -> None:
    body = {"model": BASE, "messages": [{"role": "user", "content": "forbidden"}]}
    assert "this word is not allowed" in error_of(shared.post(CHAT, json=body), 400)["message"]


UNIMPLEMENTED: list[tuple[str, Any, list[Any]]] = [
    ("best_of", 3, [1]),
    ("suffix", "end", [""]),
    ("guided_whitespace_pattern", " ", [""]),
    ("guided_decoding_backend", "x", ["auto"]),
    ("guided_by_something_new", [], []),
    ("use_beam_search", True, [False]),
    ("length_penalty", 2, [1, 1.0]),
    ("logits_processors", ["x"], [[]]),
    ("logit_processors", ["x"], [[]]),
    ("bad_words", ["x"], [[]]),
    ("allowed_token_ids", [1], [[]]),
    ("truncate_prompt_tokens", 5, []),
    ("priority", 1, [0]),
    ("use_beam_search", 0, []),
    ("num_beams", 4, [1]),
    ("typical_p", 0.5, [1]),
    ("regex", "a+", []),
    ("ebnf", "root ::= 'a'", []),
    ("grammar", {"type": "json"}, []),
    ("json_schema", "{}", []),
    ("logprob_token_ids", [1], [[]]),
    ("repetition_detection", {"max_pattern_size": 4}, []),
    ("vllm_xargs", {"a": 1}, [{}]),
]
UNIMPLEMENTED_CHAT: list[tuple[str, Any, list[Any]]] = [
    ("functions", [{}], [[]]),
    ("function_call", {"name": "f"}, ["none", "auto"]),
    ("audio", {"voice": "x"}, []),
    ("modalities", ["text", "audio"], [["text"]]),
    ("prediction", {"type": "content"}, []),
    ("reasoning_effort", "high", ["none"]),
    ("web_search_options", {}, []),
    ("chat_template", "{{ 1 }}", []),
    ("documents", [{}], [[]]),
    ("include_reasoning", False, [True]),
    ("media_io_kwargs", {"image": {}}, [{}]),
    ("thinking_token_budget", 8, []),
]


@pytest.mark.parametrize(
    ("route", "field", "value", "neutral"),
    [(route, *case) for route in BODIES for case in UNIMPLEMENTED] + [(CHAT, *case) for case in UNIMPLEMENTED_CHAT],
)
def test_known_fields_that_are_not_implemented(
    shared: httpx.Client, route: str, field: str, value: Any, neutral: list[Any]
) -> None:
    error = error_of(shared.post(route, json={**BODIES[route], field: value}), 400)
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert "not implemented" in error["message"]
    for harmless in (None, *neutral):
        assert shared.post(route, json={**BODIES[route], field: harmless}).status_code == 200, harmless


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("adapter_id", "sql", "'model'"),
        ("adapter_names", ["sql"], "'model'"),
        ("lora_path", "sql", "'model'"),
        ("lora_request", {"lora_name": "sql"}, "'model'"),
        ("max_new_tokens", 8, "max_tokens"),
        ("do_sample", False, "temperature"),
        ("num_return_sequences", 2, "use n"),
        ("stop_sequences", ["a"], "use stop"),
    ],
)
def test_what_others_call_otherwise_is_refused_with_its_name_here(
    shared: httpx.Client, route: str, field: str, value: Any, remedy: str
) -> None:
    error = error_of(shared.post(route, json={**BODIES[route], field: value}), 400)
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert remedy in error["message"]
    assert shared.post(route, json={**BODIES[route], field: None}).status_code == 200


def test_best_of_may_equal_n(shared: httpx.Client) -> None:
    assert shared.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "n": 2, "best_of": 2}).status_code == 200


@pytest.mark.parametrize("route", BODIES)
def test_fields_nobody_knows_are_ignored(shared: httpx.Client, route: str) -> None:
    body = {**BODIES[route], "frobnicate": {"deep": [1]}, "metadata": {}, "store": True}
    assert shared.post(route, json=body).status_code == 200


@pytest.mark.parametrize("refuse", [refuse_in_completion, refuse_in_chat])
def test_fields_nobody_knows_are_told_once(
    refuse: Callable[[dict[str, Any], int], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unimplemented, "_told", set())
    for _ in range(2):
        refuse({"temprature": 2, "store": True, "nothing": None, "tools": None}, 1)
    refuse({"line\nbreak": 1}, 1)
    assert [record.args for record in caplog.records] == [("'temprature'",), ("'line\\nbreak'",)]


def test_a_flood_of_unknown_fields_does_not_fill_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unimplemented, "_told", set())
    refuse_in_chat({f"field_{i}": i for i in range(1000)}, 1)
    assert len(caplog.records) == 100


@pytest.mark.parametrize("route", BODIES)
def test_whole_numbers_may_have_a_point(shared: httpx.Client, shared_engine: ScriptedClient, route: str) -> None:
    """JSON has one kind of number, and some clients write all of theirs so."""
    body = {**BODIES[route], "max_tokens": 3.0, "n": 2.0, "seed": 7.0, "top_k": 50.0, "logit_bias": {"5": 1.0}}
    assert len(shared.post(route, json=body).json()["choices"]) == 2
    params = shared_engine.requests[-1][1]
    found = (params.max_tokens, params.n, params.seed, params.top_k)
    assert found == (3, 2, 7, 50) and all(type(value) is int for value in found)
    assert error_of(shared.post(route, json={**body, "n": 1.5}), 400)["param"] == "n"


@pytest.mark.parametrize(("field", "remedy"), [("max_completion_tokens", "max_tokens"), ("top_logprobs", "logprobs")])
def test_what_chat_calls_otherwise_is_told_by_completions(shared: httpx.Client, field: str, remedy: str) -> None:
    error = error_of(shared.post(COMPLETIONS, json={**BODIES[COMPLETIONS], field: 2}), 400)
    assert error["param"] == field and f"use {remedy}" in error["message"]


def test_stream_options_that_ask_for_nothing_need_no_stream(shared: httpx.Client) -> None:
    for options in ({}, {"include_usage": False}):
        assert shared.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "stream_options": options}).status_code == 200
    error = shared.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "stream_options": {"include_usage": True}})
    assert error_of(error, 400)["param"] == "stream_options"
