"""Structured outputs of a small random model: every answer matches, wherever and in whatever company it was drawn."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given

from peft_dist import LLM, SamplingParams, StructuredOutput
from peft_dist.core.errors import InvalidRequestError
from peft_dist.core.messages import Exported, Imported
from peft_dist.core.request import Request
from tests.api.http_support import EOS
from tests.e2e.test_handover import Running
from tests.structured_models import conforms, make_writing_model, schemas, tight
from tests.thorough import examples
from tests.tiny_models import random_adapter, target_modules

torch.set_num_threads(1)
MAX_LEN = 240
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_model_len": MAX_LEN, "block_size": 4, "max_loras": 2,
}  # fmt: skip
FEW = 64


@dataclass(frozen=True)
class Form:
    """A structured output, and what tells whether a text matches it."""

    spec: StructuredOutput
    matches: Callable[[str], bool]

    @classmethod
    def of_schema(cls, schema: dict[str, Any]) -> Form:
        return cls(StructuredOutput(json_schema=tight(schema)), lambda text: conforms(json.loads(text), schema))

    @classmethod
    def of_regex(cls, regex: str) -> Form:
        return cls(StructuredOutput(regex=regex), lambda text: re.fullmatch(regex, text) is not None)

    @classmethod
    def of_choice(cls, *choices: str) -> Form:
        return cls(StructuredOutput(choice=choices), lambda text: text in choices)


def _is_balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0 or character not in "()x":
            return False
    return depth == 0 and text.count("x") == 1


FIXED = [
    Form.of_regex(r"[a-c]{1,6}-[0-9]{2}"),
    Form.of_regex(r"(hello|a/b\.)?\n{0,3}[^ -~]{2}"),
    Form.of_choice("hello", "hell", "good-bye (1)", '\n"é😀\\', "a" * 30),
    Form(StructuredOutput(grammar='start: pair\npair: "(" pair ")" | "x"\n'), _is_balanced),
]
forms = st.one_of(st.sampled_from(FIXED), schemas.map(Form.of_schema))


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[int, str], LLM]]:
    """By depth, some with few blocks and one of each way to preempt, and some that always merge; one with much room."""
    root = tmp_path_factory.mktemp("structured")
    model = make_writing_model(root / "base")
    adapters = {f"a{i}": random_adapter(model, root / f"a{i}", 4, 8.0, target_modules("llama"), seed=i) for i in (0, 1)}
    made = {
        (depth, kind): LLM(root / "base", adapters, depth=depth, **OPTIONS, **more)
        for depth in (0, 1)
        for kind, more in {
            "recompute": {"num_blocks": FEW, "preemption": "recompute"},
            "swap": {"num_blocks": FEW, "preemption": "swap", "num_host_blocks": 200},
            "merge": {"num_blocks": 400, "policy": "merge"},
        }.items()
    }
    made[0, "room"] = LLM(root / "base", adapters, num_blocks=600, enable_prefix_caching=False, **OPTIONS)
    yield made
    for llm in made.values():
        llm.close()


@st.composite
def asked(draw: st.DrawFn) -> tuple[str, SamplingParams, str | None, Form | None]:
    form = draw(st.one_of(forms, forms, st.none()))
    params = {
        "temperature": draw(st.sampled_from([0.0, 0.7, 1.5])),
        "seed": draw(st.integers(0, 5)),
        "max_tokens": 200 if form else draw(st.integers(1, 60)),
        "ignore_eos": form is None,
        "repetition_penalty": draw(st.sampled_from([1.0, 1.0, 1.2])),
        "top_k": draw(st.sampled_from([0, 0, 5])),
        "logprobs": draw(st.sampled_from([None, 1])),
    }
    prompt = "hello world, what is it? "[draw(st.integers(0, 20)) :]
    return (
        prompt,
        SamplingParams(structured=form and form.spec, **params),
        draw(st.sampled_from([None, "a0", "a1"])),
        form,
    )


def answers(llm: LLM, requests: list[Any]) -> list[Any]:
    prompts, params, names, _ = zip(*requests, strict=True)
    outputs = llm.generate(list(prompts), list(params), list(names), use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def check(answer: Any, form: Form) -> None:
    """Whole answers match, and end with the model's end; those that are cut off are rare."""
    assert answer.error is None
    if answer.finish_reason == "stop":
        assert answer.token_ids[-1] == EOS
        assert form.matches(answer.text), answer.text
    else:
        assert answer.finish_reason == "length" and len(answer.token_ids) == 200


@examples(12, 60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    requests=st.lists(asked(), min_size=1, max_size=6),
    depth=st.integers(0, 1),
    kind=st.sampled_from(["recompute", "swap"]),
)
def test_answers_match_and_are_those_of_a_request_alone(
    llms: dict[tuple[int, str], LLM], requests: list[Any], depth: int, kind: str
) -> None:
    for request, found in zip(requests, answers(llms[depth, kind], requests), strict=True):
        if request[3] is not None:
            check(found, request[3])
        [alone] = answers(llms[0, "room"], [request])
        assert found.token_ids == alone.token_ids


@examples(6, 30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(requests=st.lists(asked(), min_size=1, max_size=4), depth=st.integers(0, 1))
def test_answers_match_with_merged_weights(llms: dict[tuple[int, str], LLM], requests: list[Any], depth: int) -> None:
    for request, found in zip(requests, answers(llms[depth, "merge"], requests), strict=True):
        if request[3] is not None:
            check(found, request[3])


def test_requests_that_are_put_back_go_on_where_they_were(llms: dict[tuple[int, str], LLM]) -> None:
    form = Form.of_regex("[a-h]{70}")
    params = [SamplingParams(seed=i, max_tokens=100, structured=form.spec) for i in range(6)]
    requests = [("hello world", own, None, form) for own in params]
    expected = [answer.token_ids for answer in answers(llms[0, "room"], requests)]
    for depth in (0, 1):
        for kind in ("recompute", "swap"):
            scheduler = llms[depth, kind]._open.engine.scheduler
            before = scheduler.num_preemptions
            assert [answer.token_ids for answer in answers(llms[depth, kind], requests)] == expected
            assert scheduler.num_preemptions > before
    assert len({tuple(tokens) for tokens in expected}) == 6


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("way", ["kv", "recompute"])
@pytest.mark.parametrize("num_steps", [0, 1, 7, 25])
def test_a_request_that_moves_draws_what_it_would_have_drawn(
    llms: dict[tuple[int, str], LLM], depth: int, way: str, num_steps: int
) -> None:
    schema = {
        "type": "array",
        "items": {"type": "string", "minLength": 3, "maxLength": 3},
        "minItems": 4,
        "maxItems": 4,
    }
    params = SamplingParams(seed=3, max_tokens=120, structured=Form.of_schema(schema).spec)
    prompt = llms[0, "room"].tokenizer("hello")["input_ids"]
    source, target = (Running(llms[depth, kind]._open) for kind in ("recompute", "swap"))
    source.replica.engine.add_request(Request("r", prompt, params, 3, 0.0))
    for _ in range(num_steps):
        source.step()
    if way == "kv":
        source.replica.handovers.export(1, ["r"])
        exported = source.wait()
        assert isinstance(exported, Exported) and len(exported.sequences) == 1
    drawn = source.drawn.get("r", [])
    twin = Request("r~1", prompt, params, 3, 0.0, None, 0, list(drawn))
    target.drawn["r~1"] = list(drawn)
    if way == "kv":
        target.replica.handovers.import_requests(1, [twin], exported.sequences)
        assert target.wait() == Imported(handover=1)
        source.replica.handovers.end_export(1, moved=True)
    else:
        target.replica.engine.add_request(twin)
        source.replica.engine.abort(["r"])
    source.drain()
    target.drain()
    source.replica.engine.add_request(Request("alone", prompt, params, 3, 0.0))
    source.drain()
    assert target.drawn["r~1"] == source.drawn["alone"]
    assert len(target.drawn["r~1"]) > max(num_steps, 20) and target.drawn["r~1"][-1] == EOS


@pytest.mark.parametrize("depth", [0, 1])
def test_what_stands_beside_a_structured_output(llms: dict[tuple[int, str], LLM], depth: int) -> None:
    llm = llms[depth, "merge"]
    digits = StructuredOutput(regex="[0-9]{2,8}")

    def one(**more: Any) -> Any:
        [output] = llm.generate("hello", SamplingParams(temperature=0.0, max_tokens=20, **more), use_tqdm=False)
        return output.outputs[0]

    plain = one(structured=digits, logprobs=2)
    assert plain.finish_reason == "stop" and re.fullmatch("[0-9]{2,8}", plain.text)
    # They tell of the model's own distribution, in which a digit is not always the first.
    assert any(position[token].rank > 1 for position, token in zip(plain.logprobs, plain.token_ids, strict=True))
    # The end may come where the answer is whole: not before min_tokens.
    whole = one(structured=digits, min_tokens=7)
    assert whole.finish_reason == "stop" and re.fullmatch("[0-9]{7,8}", whole.text)
    # A grammar that can only end before that leaves nothing.
    short = one(structured=StructuredOutput(choice=["a"]), min_tokens=4)
    assert short.finish_reason == "error" and "no token is left" in short.error
    # An end that is ignored ends the form; what follows is free.
    longer = one(structured=StructuredOutput(choice=["hell"]), ignore_eos=True)
    assert longer.finish_reason == "length" and longer.text.startswith("hell") and len(longer.token_ids) == 20
    assert longer.token_ids.index(EOS) == len(llm.tokenizer("hell", add_special_tokens=False)["input_ids"])
    # Stop strings and ids, and the length, end an answer before it is whole.
    assert one(structured=StructuredOutput(choice=["ab;cd"]), stop=[";"]).text == "ab"
    [comma] = llm.tokenizer(",", add_special_tokens=False)["input_ids"]
    stopped = one(structured=StructuredOutput(choice=["ab,cd"]), stop_token_ids=[comma])
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", comma)
    cut = one(structured=StructuredOutput(regex="a{50}"))
    assert (cut.finish_reason, cut.text) == ("length", "a" * 20)


def test_each_of_n_sequences_has_its_own_place(llms: dict[tuple[int, str], LLM]) -> None:
    form = Form.of_regex("[a-f]{3,9}!")
    params = SamplingParams(n=5, seed=1, max_tokens=30, structured=form.spec)
    [output] = llms[1, "recompute"].generate("hello", params, use_tqdm=False)
    assert all(form.matches(each.text) for each in output.outputs)
    assert len({each.text for each in output.outputs}) == 5


@pytest.mark.parametrize("depth", [0, 1])
def test_a_matcher_that_fails_fails_its_request_alone(llms: dict[tuple[int, str], LLM], depth: int) -> None:
    llm = llms[depth, "recompute"]
    # More alternatives than one row of the parser may have: found out when the first token is taken in.
    too_wide = StructuredOutput(grammar="start: " + " | ".join(f'"x{i:x}"' for i in range(4000)))
    fine = Form.of_regex("[a-f]{3,9}!")
    params = [SamplingParams(seed=1, max_tokens=20, structured=spec) for spec in (fine.spec, too_wide, None)]
    requests = [("hello", own, "a0", None) for own in params]
    first, failed, last = answers(llm, requests)
    assert failed.finish_reason == "error" and "cannot be followed further" in failed.error
    assert "items" in failed.error
    assert fine.matches(first.text)
    for request, found in ((requests[0], first), (requests[2], last)):
        [alone] = answers(llms[0, "room"], [request])
        assert found.token_ids == alone.token_ids
    assert not llm._open.runner.records


def test_what_cannot_be_followed_is_refused_before_anything_runs(llms: dict[tuple[int, str], LLM]) -> None:
    llm = llms[0, "recompute"]
    steps = llm._open.engine.num_steps
    wrong = SamplingParams(structured=StructuredOutput(json_schema={"type": "strnig"}))
    with pytest.raises(InvalidRequestError, match="Invalid type: strnig") as refused:
        llm.generate(["hello", "hello"], [SamplingParams(), wrong], use_tqdm=False)
    assert refused.value.param == "structured"
    assert llm._open.engine.num_steps == steps


def test_parameters_travel_as_messages() -> None:
    for form in FIXED:
        params = SamplingParams(structured=form.spec)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
