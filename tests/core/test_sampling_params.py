"""What a user may ask of the sampler, and what each refusal names."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from peft_dist.core.errors import InvalidRequestError
from peft_dist.core.sampling_params import MAX_LOGPROBS, MAX_N, MAX_STOP_STRINGS, SamplingParams
from peft_dist.core.structured_output import StructuredOutput

HUGE = 10**400
NOT_INTEGERS = ["1", 1.0, True, [1], math.nan]
NOT_NUMBERS = ["1", True, [1.0], None, math.nan, math.inf, -math.inf, HUGE, 1j]
NOT_FLAGS = [None, 0, 1, "true", []]

REFUSED: dict[str, list[Any]] = {
    "n": [*NOT_INTEGERS, None, 0, -1, MAX_N + 1],
    "temperature": [*NOT_NUMBERS, -0.1],
    "top_k": [*NOT_INTEGERS, None, -2],
    "top_p": [*NOT_NUMBERS, 0.0, 1.01, -0.5],
    "min_p": [*NOT_NUMBERS, -0.01, 1.01],
    "presence_penalty": [*NOT_NUMBERS, 2.01, -2.01],
    "frequency_penalty": [*NOT_NUMBERS, 2.01, -2.01],
    "repetition_penalty": [*NOT_NUMBERS, 0.0, -1.0],
    "logit_bias": [
        [1], [], 5, "1", {"1": 1.0}, {-1: 1.0}, {True: 1.0}, {1: "1"}, {1: 100.5}, {1: math.nan}, {1: HUGE}, {1: None},
    ],
    "seed": [*NOT_INTEGERS, -(2**63) - 1, 2**64],
    "max_tokens": [*NOT_INTEGERS, -1],
    "min_tokens": [*NOT_INTEGERS, None, -1, 17],
    "stop": [
        *(5, 0, False, b"x", {"a": 1}, "", [""], "\ud800", ["a", "half \udc00"], ["a", 5], [None]),
        ["a"] * (MAX_STOP_STRINGS + 1),
    ],
    "stop_token_ids": [3, 0, False, "3", {3: 1}, [-1], ["3"], [1.0], [True], [None]],
    "ignore_eos": NOT_FLAGS,
    "logprobs": [*NOT_INTEGERS, -1, MAX_LOGPROBS + 1],
    "prompt_logprobs": [*NOT_INTEGERS, -1, MAX_LOGPROBS + 1],
    "skip_special_tokens": NOT_FLAGS,
    "include_stop_str_in_output": NOT_FLAGS,
    "structured": [{"regex": "a"}, "a", 5, False],
}  # fmt: skip
TAKEN: dict[str, list[Any]] = {
    "n": [1, MAX_N],
    "temperature": [0, 0.0, 1, 1e-9, 50.0],
    "top_k": [-1, 0, 1, 10**6],
    "top_p": [1e-9, 0.5, 1, 1.0],
    "min_p": [0, 0.0, 0.3, 1.0],
    "presence_penalty": [-2, 0, 2.0],
    "frequency_penalty": [-2.0, 0, 2],
    "repetition_penalty": [1e-9, 1, 30.0],
    "logit_bias": [None, {}, {0: -100, 7: 100.0}],
    "seed": [None, 0, -(2**63), 2**64 - 1],
    "max_tokens": [None, 0, 10**6],
    "min_tokens": [0, 16],
    "stop": [(), ("a", "bc"), ("a",) * MAX_STOP_STRINGS],
    "stop_token_ids": [(), (0, 5)],
    "ignore_eos": [True, False],
    "logprobs": [None, 0, MAX_LOGPROBS],
    "prompt_logprobs": [None, 0, MAX_LOGPROBS],
    "skip_special_tokens": [True, False],
    "include_stop_str_in_output": [True, False],
    "structured": [None, StructuredOutput(regex="a+")],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(n, v, id=f"{n}-{k}") for n, values in table.items() for k, v in enumerate(values)]


def test_no_field_is_left_out_here() -> None:
    assert set(REFUSED) == set(TAKEN) == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize(("name", "value"), cases(REFUSED))
def test_what_is_refused_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} must be") as refused:
        SamplingParams(**{name: value})
    assert refused.value.param == name


@pytest.mark.parametrize(("name", "value"), cases(TAKEN))
def test_what_is_taken_is_kept_and_survives_the_way_to_the_replica(name: str, value: Any) -> None:
    params = SamplingParams(**{name: value})
    assert getattr(params, name) == value
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("stop", "end", ("end",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", None, ()),
        ("stop_token_ids", [3, 4], (3, 4)),
        ("stop_token_ids", {3}, (3,)),
        ("stop_token_ids", None, ()),
    ],
)
def test_further_ways_to_write_the_stops(name: str, value: Any, kept: tuple[Any, ...]) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == kept


def test_the_fewest_tokens_are_bounded_by_the_most() -> None:
    assert SamplingParams(min_tokens=5, max_tokens=5).min_tokens == 5
    assert SamplingParams(min_tokens=500, max_tokens=None).min_tokens == 500
    with pytest.raises(InvalidRequestError, match="max_tokens=4") as refused:
        SamplingParams(min_tokens=5, max_tokens=4)
    assert refused.value.param == "min_tokens"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.integers() | st.text(), inner) | st.tuples(inner),
    max_leaves=4,
)


@given(name=st.sampled_from(sorted(REFUSED)), value=ANYTHING)
def test_anything_is_either_taken_or_refused_by_name(name: str, value: Any) -> None:
    try:
        SamplingParams(**{name: value})
    except InvalidRequestError as refused:
        assert refused.param == name or (name, refused.param) == ("max_tokens", "min_tokens")
