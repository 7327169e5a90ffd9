"""Tools in ``/v1/chat/completions``, through the ``openai`` client and as bodies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from peft_dist.api.options import ServerOptions
from peft_dist.api.protocol_tools import Tool
from peft_dist.api.tool_use import ToolUse
from tests.api import http_support
from tests.api.http_support import BASE, CHAT, TOKENIZER, ScriptedClient, serving

HELLO: list[Any] = [{"role": "user", "content": "weather?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME: Any = {"type": "function", "function": {"name": "get_time"}}
# What Hermes' and Qwen's templates do, in short.
TEMPLATE = (
    "{% if tools %}tools: {% for tool in tools %}{{ tool | tojson }}{% endfor %} as <tool_call>\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls %}[{{ c.id }} {{ c.function.name }}({{ c.function.arguments.city }})]{% endfor %}"
    "{% if m.tool_call_id %} for {{ m.tool_call_id }}{% endif %}\n{% endfor %}assistant: "
)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def rendered(engine: ScriptedClient, number: int = -1) -> str:
    return str(TOKENIZER.decode(engine.requests[number][0]))


@pytest.fixture
def api(engine: ScriptedClient) -> Iterator[openai.OpenAI]:
    with (
        serving(engine, ServerOptions(chat_template=TEMPLATE)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=100) as client,
    ):
        yield client


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda text: monkeypatch.setitem(http_support.ANSWERS, None, text)


def test_the_model_calls_of_itself(api: openai.OpenAI, engine: ScriptedClient, says: Any) -> None:
    says(f"I look. {CALL}{CALL}")
    answer = api.chat.completions.create(model=BASE, messages=HELLO, tools=[WEATHER, TIME])
    assert "tools: " + json.dumps(WEATHER)[:20] in rendered(engine) and "get_time" in rendered(engine)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look. "
    calls = choice.message.tool_calls
    assert [(call.type, call.function.name, call.function.arguments) for call in calls] == [
        ("function", "get_weather", '{"city": "Oslo"}')
    ] * 2
    assert len({call.id for call in calls}) == 2 and all(call.id.startswith("call_") for call in calls)
    # The answer goes back as it came, with what the calls came to.
    history = [*HELLO, choice.message.model_dump(), {"role": "tool", "tool_call_id": calls[0].id, "content": "rain"}]
    api.chat.completions.create(model=BASE, messages=history, tools=[WEATHER])
    assert f"assistant: I look. [{calls[0].id} get_weather(Oslo)]" in rendered(engine)
    assert f"tool: rain for {calls[0].id}" in rendered(engine)


def test_a_stream_tells_the_same(api: openai.OpenAI, says: Any) -> None:
    says(f"I look. {CALL} so")
    chunks = list(api.chat.completions.create(model=BASE, messages=HELLO, tools=[WEATHER], stream=True, n=2))
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(c.delta.content or "" for c in own) == "a" * index + "I look.  so"
        (call,) = [call for c in own for call in c.delta.tool_calls or []]
        assert (call.index, call.function.name, call.function.arguments) == (0, "get_weather", '{"city": "Oslo"}')
        assert [c.finish_reason for c in own if c.finish_reason] == ["tool_calls"]


def test_plain_answers_stay_plain(api: openai.OpenAI, engine: ScriptedClient, says: Any) -> None:
    answer = api.chat.completions.create(model=BASE, messages=HELLO, tools=[WEATHER])
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.tool_calls is None
    says(CALL)
    answer = api.chat.completions.create(model=BASE, messages=HELLO, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.content == CALL and "get_weather" not in rendered(engine)


def test_one_call_where_several_are_not_wanted(api: openai.OpenAI, says: Any) -> None:
    says(CALL + CALL)
    asked: dict[str, Any] = {"model": BASE, "messages": HELLO, "tools": [WEATHER], "parallel_tool_calls": False}
    assert len(api.chat.completions.create(**asked).choices[0].message.tool_calls) == 1
    told = [
        call for c in api.chat.completions.create(**asked, stream=True) for call in c.choices[0].delta.tool_calls or []
    ]
    assert len(told) == 1


def test_a_named_function_must_be_called(api: openai.OpenAI, engine: ScriptedClient, says: Any) -> None:
    says('{"city": "Rome"}')
    choice: Any = {"type": "function", "function": {"name": "get_weather"}}
    asked: dict[str, Any] = {"model": BASE, "messages": HELLO, "tools": [TIME, WEATHER], "tool_choice": choice}
    (found,) = api.chat.completions.create(**asked).choices
    assert engine.requests[-1][1].structured.json_schema is not None
    schema = json.loads(engine.requests[-1][1].structured.json_schema)
    assert schema.pop("x-guidance") and schema == WEATHER["function"]["parameters"]
    assert found.finish_reason == "stop" and found.message.content is None
    assert found.message.tool_calls[0].function.model_dump() == {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    told = [
        call for c in api.chat.completions.create(**asked, stream=True) for call in c.choices[0].delta.tool_calls or []
    ]
    assert "".join(call.function.arguments for call in told) == '{"city": "Rome"}' and len(told) > 3
    assert [call.function.name for call in told if call.function.name] == ["get_weather"]


def test_some_function_must_be_called(api: openai.OpenAI, engine: ScriptedClient, says: Any) -> None:
    says('[{"name": "get_time", "parameters": {}}, {"name": "get_weather", "parameters": {"city": "Rome"}}]')
    asked: dict[str, Any] = {"model": BASE, "messages": HELLO, "tools": [TIME, WEATHER], "tool_choice": "required"}
    (found,) = api.chat.completions.create(**asked).choices
    schema = json.loads(engine.requests[-1][1].structured.json_schema)
    assert [one["properties"]["name"] for one in schema["items"]["anyOf"]] == [
        {"const": "get_time"},
        {"const": "get_weather"},
    ]
    assert found.finish_reason == "tool_calls" and found.message.content is None
    assert [call.function.name for call in found.message.tool_calls] == ["get_time", "get_weather"]
    chunks = list(api.chat.completions.create(**asked, stream=True))
    told = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
    assert [(call.index, call.function.name) for call in told] == [(0, "get_time"), (1, "get_weather")]


def test_references_of_parameters_are_from_where_they_stand() -> None:
    schema = {"$id": "https://x.example/y", "properties": {"a": {"$ref": "#/$defs/A"}, "b": {"$ref": "#"}},
              "$defs": {"A": {"const": {"$ref": "#"}}}}  # fmt: skip
    tools = [Tool.model_validate({"type": "function", "function": {"name": n, "parameters": schema}}) for n in "fg"]
    use = ToolUse.of(tools, "required", False, None)
    assert use is not None and use.schema is not None and use.schema["maxItems"] == 1
    for index, one in enumerate(use.schema["items"]["anyOf"]):
        parameters = one["properties"]["parameters"]
        assert parameters["type"] == "object" and "$id" not in parameters
        assert parameters["$defs"] == schema["$defs"], "a value is none of the schema's references"
        found = parameters["properties"]
        root = f"#/items/anyOf/{index}/properties/parameters"
        assert (found["a"], found["b"]) == ({"$ref": f"{root}/$defs/A"}, {"$ref": root})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "code", "function": TIME["function"]}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [TIME, TIME]}, "tools[1]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "\ud800"}}]}, "tools"),
        ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [TIME], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}]},
         "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "messages[0].content"),
        ({"messages": [*HELLO, {"role": "user", "content": "\ud800"}]}, "messages[1].content"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"\ud800": {}}}}],
          "tool_choice": "required"}, "tools"),
        ({"structured_outputs": {"choice": ["\ud800"]}}, "structured_outputs.choice"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
         "messages[0].tool_calls[0].function.arguments"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_named(engine: ScriptedClient, fields: Any, param: str) -> None:
    with serving(engine, ServerOptions(chat_template=TEMPLATE)) as url:
        # As ASCII, which can write half of a surrogate pair.
        content = json.dumps({"model": BASE, "messages": HELLO, **fields})
        answer = httpx.post(url + CHAT, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert not engine.requests


def test_a_template_without_tools_is_told(http: httpx.Client, engine: ScriptedClient) -> None:
    asked = {"model": BASE, "messages": HELLO, "tools": [TIME]}
    for choice in (None, "auto", "required"):
        error = http.post(CHAT, json={**asked, "tool_choice": choice}).json()["error"]
        assert error["param"] == "tools" and "--chat-template" in error["message"]
    assert http.post(CHAT, json={**asked, "tool_choice": "none", "max_tokens": 2}).status_code == 200
    assert len(engine.requests) == 1


def test_a_template_that_tells_not_how_to_call(engine: ScriptedClient) -> None:
    """Then the remedies that the error names are some."""
    asked = {"model": BASE, "messages": HELLO, "tools": [TIME]}
    with serving(engine, ServerOptions(chat_template="{{ tools }}{{ messages[0].content }}")) as url:
        error = httpx.post(url + CHAT, json=asked).json()["error"]
        assert error["param"] == "tool_choice" and "--tool-call-parser" in error["message"]
        assert httpx.post(url + CHAT, json={**asked, "tool_choice": "required", "max_tokens": 2}).status_code == 200


def test_the_operator_says_how_the_model_calls(engine: ScriptedClient, says: Any) -> None:
    says('{"name": "get_time", "parameters": {}}')
    options = ServerOptions(chat_template="{{ tools }}{{ messages[0].content }}", tool_call_parser="llama3_json")
    with serving(engine, options) as url:
        answer = httpx.post(url + CHAT, json={"model": BASE, "messages": HELLO, "tools": [TIME]}).json()
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"] == {"name": "get_time", "arguments": "{}"}


def test_tools_count_in_tokenize(engine: ScriptedClient) -> None:
    with serving(engine, ServerOptions(chat_template=TEMPLATE)) as url:
        plain, more = (
            httpx.post(f"{url}/tokenize", json={"messages": HELLO, "tools": tools}).json()["count"]
            for tools in (None, [WEATHER])
        )
    assert more > plain + 50
