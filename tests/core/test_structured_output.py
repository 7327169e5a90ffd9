"""What may be asked of an answer's form, and what each refusal names."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from peft_dist.core.errors import InvalidRequestError
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.structured_output import MAX_BYTES, StructuredOutput
from peft_dist.orchestrator.untaken import most_bytes


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"json_schema": {"b": 1, "a": [True]}}, "json_schema", '{"b":1,"a":[true]}'),
        ({"json_schema": ' {"type": "string"} '}, "json_schema", ' {"type": "string"} '),
        ({"json_schema": True}, "json_schema", "true"),
        ({"json_schema": False}, "json_schema", "false"),
        ({"json_object": True}, "json_schema", '{"type":"object"}'),
        ({"regex": "a+"}, "regex", "a+"),
        ({"choice": ["a", 'é"']}, "choice", '["a","é\\""]'),
        ({"grammar": 'start: "a"'}, "grammar", 'start: "a"'),
    ],
)
def test_what_is_taken(given: dict[str, Any], kind: str, text: str) -> None:
    spec = StructuredOutput(**given)
    assert (spec.kind, spec.text) == (kind, text)
    # Equal ones are found again among those that were read.
    assert hash(spec) == hash(StructuredOutput(**given))
    for coder in (msgspec.json, msgspec.msgpack):
        assert coder.decode(coder.encode(spec), type=StructuredOutput) == spec


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({}, None, "says nothing"),
        ({"json_object": False}, None, "says nothing"),
        ({"regex": "a", "choice": ["a"]}, "choice", "regex and choice exclude each other"),
        ({"json_object": True, "json_schema": {}}, "json_object", "exclude each other"),
        ({"json_object": 1}, "json_object", "True or False"),
        ({"json_schema": [1]}, "json_schema", "a JSON schema"),
        ({"json_schema": 5}, "json_schema", "a JSON schema"),
        ({"json_schema": "{"}, "json_schema", "not valid JSON"),
        ({"json_schema": {"a": {1j}}}, "json_schema", "cannot be written"),
        ({"json_schema": {"a": "\ud800"}}, "json_schema", "lone surrogate"),
        ({"json_schema": {"\ud800": 1}}, "json_schema", "lone surrogate"),
        ({"json_schema": {"const": float("nan")}}, "json_schema", "cannot be written"),
        ({"json_schema": {"enum": [1, float("inf")]}}, "json_schema", "cannot be written"),
        ({"regex": 5}, "regex", "a string"),
        ({"regex": "\ud800"}, "regex", "lone surrogate"),
        ({"regex": "é" * (MAX_BYTES // 2 + 1)}, "regex", f"at most {MAX_BYTES}"),
        ({"choice": []}, "choice", "at least one"),
        ({"choice": "ab"}, "choice", "a list"),
        ({"choice": ["a", 5]}, "choice", "a list"),
        ({"choice": ["a" * MAX_BYTES]}, "choice", f"at most {MAX_BYTES}"),
        ({"choice": ["a", "\udfff"]}, "choice", "lone surrogate"),
        ({"grammar": b"start"}, "grammar", "a string"),
    ],
)
def test_what_is_refused(given: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words) as refused:
        StructuredOutput(**given)
    assert refused.value.param == param


def test_a_schema_without_json_for_it() -> None:
    nested: dict[str, Any] = {}
    for _ in range(100_000):
        nested = {"items": nested}
    with pytest.raises(InvalidRequestError, match="cannot be written"):
        StructuredOutput(json_schema=nested)


def test_it_counts_among_what_is_on_its_way() -> None:
    spec = StructuredOutput(choice=["é" * 1000] * 3)
    plain, shaped = SamplingParams(), SamplingParams(structured=spec)
    more = most_bytes(5, shaped) - most_bytes(5, plain)
    assert more >= len(msgspec.msgpack.encode(shaped)) - len(msgspec.msgpack.encode(plain))
