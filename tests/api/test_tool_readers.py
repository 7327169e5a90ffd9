"""What a model writes becomes content and calls, however it is cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_dist.api.tool_readers import (
    ArrayReader,
    CallDelta,
    HermesReader,
    LlamaReader,
    NamedReader,
    Said,
    ToolReader,
    reader_for,
)

NAMES = st.text("abcxyz_", min_size=1, max_size=8)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a{}[]"\\<>;, é', max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=3)
WORDS = st.text("ab <tol_ca>/\n", max_size=20).filter(lambda text: "<tool_call>" not in text)


def read(reader: ToolReader, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    """All content, and calls with the names and the arguments that the pieces of each add up to."""
    said: list[Said] = [one for piece in pieces for one in reader.feed(piece)] + reader.end()
    content = "".join(one for one in said if isinstance(one, str))
    calls: dict[int, list[CallDelta]] = {}
    for one in said:
        if isinstance(one, CallDelta):
            calls.setdefault(one.index, []).append(one)
    assert list(calls) == list(range(len(calls)))
    assert all((delta.name is None) == bool(i) for own in calls.values() for i, delta in enumerate(own))
    return content, [(str(own[0].name), "".join(delta.arguments for delta in own)) for own in calls.values()]


def parsed(calls: list[tuple[str, str]]) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in calls]


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[str]:
    ends = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@given(st.data(), CALLS, st.lists(WORDS, min_size=4, max_size=4), st.booleans())
def test_hermes(data: st.DataObject, calls: list[tuple[str, Any]], words: list[str], closes: bool) -> None:
    blocks = [json.dumps({"name": name, "arguments": given}) for name, given in calls]
    # A tag within an argument's string would end the call, for every reader of this form.
    if any("<tool_call>" in block or "</tool_call>" in block for block in blocks):
        return
    text = words[0] + "".join(f"<tool_call>\n{block}\n</tool_call>{words[i + 1]}" for i, block in enumerate(blocks))
    if not closes:
        text, words[len(blocks)] = text[: text.rindex("</tool_call>")], ""
    content, found = read(HermesReader({name for name, _ in calls}), data.draw(cut(text)))
    assert content == "".join(words[: len(blocks) + 1]) and parsed(found) == calls


@pytest.mark.parametrize(
    "inside",
    [
        "no json",
        '{"arguments": {}}',
        '{"name": 5}',
        "[1]",
        '{"name": "f", "arguments": 3}',
        "[" * 100_000,
        '{"name": "f"}',
        '{"name": "f", "arguments": "hello"}',
        '{"name": "g", "arguments": {}}',
    ],
)
def test_what_is_no_call_stays_text(inside: str) -> None:
    text = f"see <tool_call>{inside}</tool_call> there"
    assert read(HermesReader({"f"}), [text]) == (text, [])
    cut_off = f"see <tool_call>{inside}"
    assert read(HermesReader({"f"}), [cut_off]) == (cut_off, [])


def test_hermes_takes_several_calls_of_one_tag() -> None:
    text = '<tool_call>[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "parameters": "{}"}]</tool_call>'
    assert read(HermesReader({"f", "g"}), [text]) == ("", [("f", '{"a": 1}'), ("g", "{}")])


def test_text_is_held_back_only_while_it_may_become_a_tag() -> None:
    reader = HermesReader({"f"})
    assert reader.feed("a < b <tool") == ["a < b "] and reader.feed("box") == ["<toolbox"]


@given(st.data(), CALLS, st.sampled_from(["; ", ";", "\n"]), st.sampled_from(["", "<|python_tag|>", " \n"]))
def test_llama(data: st.DataObject, calls: list[tuple[str, Any]], between: str, before: str) -> None:
    text = before + between.join(json.dumps({"name": name, "parameters": given}) for name, given in calls)
    content, found = read(LlamaReader({name for name, _ in calls}), data.draw(cut(text)))
    assert content == "" and parsed(found) == calls


@pytest.mark.parametrize(
    "text", ["hello", '{"a": 1}', '{"name": "f"', "<|pyth", " ", "", '{"name": "f"} and', "{" * 100_000]
)
def test_an_answer_that_is_no_call_is_text(text: str) -> None:
    assert read(LlamaReader({"f"}), [text]) == (text, [])
    assert read(LlamaReader({"f"}), list(text[:50])) == (text[:50], [])


@given(st.data(), CALLS)
def test_an_array(data: st.DataObject, calls: list[tuple[str, Any]]) -> None:
    text = json.dumps(
        [{"name": name, "parameters": given} for name, given in calls], indent=data.draw(st.sampled_from([None, 2]))
    )
    content, found = read(ArrayReader(), data.draw(cut(text)))
    assert content == "" and parsed(found) == calls
    _, found = read(ArrayReader(), [text[: text.rindex("}")]])
    assert parsed(found) == calls[:-1]


@given(st.data(), st.text(max_size=30))
def test_arguments_of_a_named_function(data: st.DataObject, text: str) -> None:
    assert read(NamedReader("f"), data.draw(cut(text))) == ("", [("f", text)])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ('Respond in the format {"name": function name, "parameters": dictionary of argument name}', "llama3_json"),
        ("{{ '<|python_tag|>' }}", "llama3_json"),
        ("<tool_call>\n<function=name>", None),
        ("{{ messages }}", None),
        ("", None),
    ],
)
def test_a_template_shows_how_its_model_calls(template: str, name: str | None) -> None:
    assert reader_for(template) == name


def test_a_long_array_is_looked_at_once() -> None:
    """As many braces as there are pieces: what is parsed is parsed when it is whole."""
    inner = '{"k": "}{"}'
    pieces = ['[{"name": "f", "parameters": {"a": ["\\\\"', *[f", {inner}"] * 3000, "]}}]"]
    reader, said = ArrayReader(), []
    for piece in pieces:
        said += reader.feed(piece)
        assert len(said) == (piece == pieces[-1])
    [call] = said
    assert isinstance(call, CallDelta) and len(json.loads(call.arguments)["a"]) == 3001
