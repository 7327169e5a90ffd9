"""Structured outputs from a server with a replica of its own, and from a real model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from peft_dist import LLM, SamplingParams, StructuredOutput
from scripts.demo_model import ensure_demo_model
from tests.e2e.test_serve import Server
from tests.e2e.test_serve_model import ModelServer
from tests.structured_models import conforms, make_writing_model, tight
from tests.tiny_models import random_adapter, target_modules

ROOT = Path(__file__).parents[2]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["cat", "dog"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 30}, "maxItems": 3},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}
PET: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "age": {"type": "integer", "minimum": 0, "maximum": 30}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": tight(SCHEMA)}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    model = make_writing_model(folder / "model")
    template = folder / "model" / "chat_template.jinja"
    template.write_text("{{ tools | length if tools else '' }}" + template.read_text())
    for number in range(2):
        random_adapter(model, folder / f"a{number}", 4, 8.0, target_modules("llama"), seed=number)
    started = ModelServer(folder)
    try:
        started.until(started.port_file.exists)
        yield started
        assert started.stop() == 0, started.log
        assert "Traceback" not in started.log and "structured outputs will fail" not in started.log
    finally:
        started.process.kill()
        started.process.wait()


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=200) as client:
        yield client


@pytest.mark.parametrize("model", ["tiny", "a0", "a1"])
def test_a_streamed_chat_is_the_object_that_was_asked_for(api: openai.OpenAI, model: str) -> None:
    def ask(**more: Any) -> Any:
        messages: Any = [{"role": "user", "content": "hello"}]
        return api.chat.completions.create(
            model=model, messages=messages, response_format=FORMAT, seed=5, max_tokens=100, **more
        )

    text, reasons = "", []
    for chunk in ask(stream=True):
        text += chunk.choices[0].delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert conforms(json.loads(text), SCHEMA)
    assert reasons[-1] == "stop"
    assert ask().choices[0].message.content == text


@pytest.mark.parametrize("model", ["tiny", "a0"])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "keep"}}])
def test_calls_that_must_be_made_follow_their_functions_schema(api: openai.OpenAI, model: str, choice: Any) -> None:
    """Random weights call nothing by chance. Of one name, as of "#" in one schema, the other has none."""
    nested = {"type": "object", "properties": {"pet": {"$ref": "#/$defs/Pet"}}, "required": ["pet"],
              "additionalProperties": False, "$defs": {"Pet": PET}}  # fmt: skip
    tools: Any = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in (("adopt", nested), ("keep", PET))
    ]

    def ask(**more: Any) -> Any:
        messages: Any = [{"role": "user", "content": "hello"}]
        return api.chat.completions.create(
            model=model, messages=messages, tools=tools, tool_choice=choice, parallel_tool_calls=False,
            **more,
        )  # fmt: skip

    names = set()
    for seed in range(6):
        (found,) = ask(seed=seed).choices
        (call,) = found.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert found.message.content is None
        assert conforms(arguments["pet"] if call.function.name == "adopt" else arguments, PET)
        names.add(call.function.name)
    told = [call for chunk in ask(seed=5, stream=True) for call in chunk.choices[0].delta.tool_calls or []]
    assert "".join(call.function.arguments for call in told) == call.function.arguments
    assert names == ({"adopt", "keep"} if choice == "required" else {"keep"})


def test_wrong_and_right_ones_beside_each_other(api: openai.OpenAI) -> None:
    def ask(**extra: Any) -> Any:
        return api.completions.create(model="a0", prompt="hello", max_tokens=40, seed=1, extra_body=extra, n=3)

    stream = api.completions.create(
        model="a1", prompt="hello", max_tokens=100, extra_body={"ignore_eos": True}, stream=True
    )
    assert next(stream).choices[0].finish_reason is None
    with pytest.raises(openai.BadRequestError, match="Invalid type: strnig"):
        ask(structured_outputs={"json": {"type": "strnig"}})
    found = ask(structured_outputs={"regex": "[a-d]{2,9};"})
    assert all(re.fullmatch("[a-d]{2,9};", choice.text) and choice.finish_reason == "stop" for choice in found.choices)
    assert {choice.text for choice in ask(guided_choice=["yes", "no"]).choices} <= {"yes", "no"}
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_real_model_writes_what_the_schema_asks_for() -> None:
    schema = {
        "type": "object",
        "properties": {
            "title": {"type": "string", "maxLength": 40},
            "year": {"type": "integer", "minimum": 1000, "maximum": 2100},
            "language": {"enum": ["German", "English", "French"]},
        },
        "required": ["title", "year", "language"],
        "additionalProperties": False,
    }
    question = [{"role": "user", "content": "Name a famous book by Goethe, its year and its language, in JSON."}]
    spec = StructuredOutput(json_schema=tight(schema))
    params = [SamplingParams(temperature=t, seed=1, max_tokens=80, structured=spec) for t in (0.0, 0.8, 1.2)]
    with LLM(
        ensure_demo_model(), {"sql": ROOT / "scripts" / "demo_adapters" / "sql"}, device="cpu", max_model_len=512
    ) as llm:
        outputs = llm.chat([question] * 6, params * 2, [None] * 3 + ["sql"] * 3, use_tqdm=False)
    for output in outputs:
        assert output.outputs[0].finish_reason == "stop"
        book = json.loads(output.outputs[0].text)
        assert list(book) == ["title", "year", "language"]
        assert len(book["title"]) <= 40 and 1000 <= book["year"] <= 2100
        assert book["language"] in schema["properties"]["language"]["enum"]
