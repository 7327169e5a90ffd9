"""Fields that ask for structured outputs: what each becomes, what is refused, and with which words."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from typing import Any

import httpx
import pytest

from peft_dist.core import grammars
from peft_dist.core.structured_output import MAX_BYTES, StructuredOutput
from tests.api.http_support import BASE, BODIES, CHAT, COMPLETIONS, ScriptedClient, error_of, serving

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
OF_SCHEMA = StructuredOutput(json_schema=SCHEMA)
LARK = 'start: "a" b\nb: "b" | "(" b ")"\n'
TAKEN: list[tuple[str, Any, StructuredOutput | None]] = [
    ("response_format", {"type": "text"}, None),
    ("response_format", {"type": "text", "json_schema": None}, None),
    ("response_format", {"type": "json_object"}, StructuredOutput(json_object=True)),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, OF_SCHEMA),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "description": "y", "schema": SCHEMA}},
        OF_SCHEMA,
    ),
    ("structured_outputs", {}, None),
    ("structured_outputs", {"json": None, "json_object": False, "backend": None}, None),
    ("structured_outputs", {"json": SCHEMA}, OF_SCHEMA),
    ("structured_outputs", {"json": '{"type": "integer"}'}, StructuredOutput(json_schema='{"type": "integer"}')),
    ("structured_outputs", {"json": {}}, StructuredOutput(json_schema={})),
    ("structured_outputs", {"json_object": True}, StructuredOutput(json_object=True)),
    ("structured_outputs", {"regex": "[a-z]+"}, StructuredOutput(regex="[a-z]+")),
    ("structured_outputs", {"choice": ["yes", "no"]}, StructuredOutput(choice=["yes", "no"])),
    ("structured_outputs", {"grammar": LARK}, StructuredOutput(grammar=LARK)),
    ("structured_outputs", {"grammar": "start: <|im_end|>"}, StructuredOutput(grammar="start: <|im_end|>")),
    ("guided_json", SCHEMA, OF_SCHEMA),
    ("guided_json", {}, StructuredOutput(json_schema={})),
    ("guided_regex", "[a-z]+", StructuredOutput(regex="[a-z]+")),
    ("guided_regex", "", None),
    ("guided_choice", ["a"], StructuredOutput(choice=["a"])),
    ("guided_choice", [], None),
    ("guided_grammar", LARK, StructuredOutput(grammar=LARK)),
    ("guided_grammar", "", None),
    ("guided_json_object", True, StructuredOutput(json_object=True)),
    ("guided_json_object", False, None),
]


def refused(http: httpx.Client, engine: ScriptedClient, route: str, **fields: Any) -> dict[str, Any]:
    before = len(engine.requests)
    error = error_of(http.post(route, json={**BODIES[route], **fields}), 400)
    assert len(engine.requests) == before, "a refused request reached the engine"
    return error


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(("field", "value", "spec"), TAKEN)
def test_what_is_taken(
    shared: httpx.Client,
    shared_engine: ScriptedClient,
    route: str,
    field: str,
    value: Any,
    spec: StructuredOutput | None,
) -> None:
    for stream in (False, True):
        response = shared.post(route, json={**BODIES[route], field: value, "stream": stream})
        assert response.status_code == 200, response.text
        assert shared_engine.requests[-1][1].structured == spec


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", "is missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strnig"}}}},
            "response_format",
            "Invalid type: strnig",
        ),
        ({"response_format": {}}, "response_format.type", "required"),
        ({"response_format": "json"}, "response_format", "not valid"),
        ({"structured_outputs": {"json": {"type": 5}}}, "structured_outputs.json", "cannot be followed"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not valid JSON"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json", "must be an object or boolean"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json", 'Unimplemented keys: ["not"]'),
        ({"structured_outputs": {"json": {"enum": []}}}, "structured_outputs.json", "cannot be followed"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex", "look-ahead"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least one string"),
        ({"structured_outputs": {"choice": ["a", 5]}}, "structured_outputs.choice", "not valid"),
        ({"structured_outputs": {"grammar": "root ::= 'a'"}}, "structured_outputs.grammar", "cannot be followed"),
        ({"structured_outputs": {"grammar": "start: start"}}, "structured_outputs.grammar", "nothing matches it"),
        ({"structured_outputs": {"grammar": "start: <|x|>"}}, "structured_outputs.grammar", "unknown special token"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "exclude each other"),
        ({"guided_json": {"type": "strnig"}}, "guided_json", "Invalid type: strnig"),
        ({"guided_json": [1]}, "guided_json", "not valid"),
        ({"guided_regex": "["}, "guided_regex", "unclosed character class"),
        ({"guided_regex": 5}, "guided_regex", "not valid"),
        ({"guided_grammar": "x: y"}, "guided_grammar", "no start rule"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "exclude each other"),
        ({"guided_json_object": 1}, "guided_json_object", "not valid"),
    ],
)
def test_what_is_wrong_is_named(
    shared: httpx.Client, shared_engine: ScriptedClient, route: str, fields: dict[str, Any], param: str, words: str
) -> None:
    error = refused(shared, shared_engine, route, **fields)
    assert error["code"] == "invalid_value"
    assert error["param"] == param and param.split(".")[0] in error["message"]
    assert words in error["message"]


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "structural_tag", "structures": [], "triggers": []}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format.schema"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": " ?"}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs.disable_any_whitespace"),
        ({"structured_outputs": {"regex": "a", "backend": "xgrammar"}}, "structured_outputs.backend"),
        ({"guided_json": {}, "guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"guided_json": {}, "guided_decoding_backend": "outlines"}, "guided_decoding_backend"),
    ],
)
def test_what_is_not_implemented(
    shared: httpx.Client, shared_engine: ScriptedClient, route: str, fields: dict[str, Any], param: str
) -> None:
    error = refused(shared, shared_engine, route, **fields)
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")


def test_a_reference_into_a_reference_ends_no_server(engine: ScriptedClient, http: httpx.Client) -> None:
    """Each is read within the one before."""
    depth = 1100
    definitions: dict[str, Any] = {f"d{i}": {"properties": {"p": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(depth)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**definitions, f"d{depth}": {}}}
    response = http.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "guided_json": schema})
    assert response.status_code == 200, response.text
    rules = "".join(f"r{i}: r{i + 1} b\n" for i in range(3500))
    response = http.post(
        COMPLETIONS, json={**BODIES[COMPLETIONS], "guided_grammar": f'start: r0\n{rules}r3500: "a"\nb: "b"'}
    )
    assert response.status_code == 200, response.text
    assert http.get("/health").status_code == 200


def test_what_is_too_long(shared: httpx.Client, engine: ScriptedClient, http: httpx.Client) -> None:
    error = refused(http, engine, CHAT, guided_regex="a" * (MAX_BYTES + 1))
    assert error["param"] == "guided_regex" and str(MAX_BYTES) in error["message"]


def test_what_takes_too_long_to_read(
    engine: ScriptedClient, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_dist.api.structured.MOST_SECONDS", 0.0)
    error = refused(http, engine, CHAT, guided_regex="a")
    assert error["param"] == "guided_regex" and "make it simpler" in error["message"]


def test_streams_go_on_while_a_grammar_is_read(
    engine: ScriptedClient, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on = threading.Event(), threading.Event()
    read = grammars.read

    def wait_and_read(*args: Any) -> Any:
        reading.set()
        assert go_on.wait(60)
        return read(*args)

    monkeypatch.setattr(grammars, "read", wait_and_read)
    answers: list[httpx.Response] = []
    body = {**BODIES[COMPLETIONS], "guided_regex": "a+"}
    asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{http.base_url}{COMPLETIONS}", json=body)))
    asking.start()
    assert reading.wait(60)
    assert http.post(COMPLETIONS, json={**BODIES[COMPLETIONS], "stream": True}).text.endswith("data: [DONE]\n\n")
    assert not answers
    go_on.set()
    asking.join(60)
    assert answers[0].status_code == 200


def test_without_the_library(engine: ScriptedClient, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    error = refused(http, engine, CHAT, response_format={"type": "json_object"})
    assert error["param"] == "response_format"
    assert "pip install 'peft-dist[structured]'" in error["message"]
    for harmless in ({"type": "text"}, None):
        assert http.post(CHAT, json={**BODIES[CHAT], "response_format": harmless}).status_code == 200


def test_without_a_tokenizer(engine: ScriptedClient) -> None:
    body = {"model": BASE, "prompt": [5, 6], "max_tokens": 3}
    with serving(engine, tokenizer=None) as url:
        error = error_of(httpx.post(f"{url}{COMPLETIONS}", json={**body, "guided_regex": "a"}), 400)
        assert error["param"] == "guided_regex" and "tokenizer" in error["message"]
        assert httpx.post(f"{url}{COMPLETIONS}", json={**body, "guided_regex": ""}).status_code == 200


def test_without_an_end_of_sequence(engine: ScriptedClient) -> None:
    engine.model = replace(engine.model, eos_token_ids=())
    with serving(engine) as url:
        error = error_of(httpx.post(f"{url}{CHAT}", json={**BODIES[CHAT], "guided_regex": "a"}), 400)
    assert "end-of-sequence" in error["message"]


def test_whole_bodies_may_be_tokenized(shared: httpx.Client) -> None:
    body = {"prompt": "hello", "response_format": {"type": "json_object"}, "guided_json": {"type": "strnig"}}
    assert shared.post("/tokenize", json=body).status_code == 200
