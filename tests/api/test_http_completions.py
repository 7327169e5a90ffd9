"""``/v1/completions`` through the ``openai`` client."""

from __future__ import annotations

import httpx
import openai
import pytest

from tests.api.http_support import ANSWERS, BASE, EOS, TOKENIZER, ScriptedClient, encode

FULL = ANSWERS[None]


def test_text_prompt_gets_the_whole_answer(api: openai.OpenAI, engine: ScriptedClient) -> None:
    answer = api.completions.create(model=BASE, prompt="hello", max_tokens=100)
    assert answer.object == "text_completion" and answer.model == BASE and answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (FULL, "stop", 0)
    prompt, params, _ = engine.requests[0]
    assert prompt == [0, *encode("hello")]
    assert params.max_tokens == 100
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == len(encode(FULL)) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_default_length_is_16_or_what_the_prompt_leaves(api: openai.OpenAI, engine: ScriptedClient) -> None:
    answer = api.completions.create(model=BASE, prompt="hello")
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"
    api.completions.create(model=BASE, prompt=[5] * 505)
    assert engine.requests[1][1].max_tokens == 7


def test_ids_are_used_as_they_are(api: openai.OpenAI, engine: ScriptedClient) -> None:
    api.completions.create(model=BASE, prompt=[7, 8, 9])
    assert engine.requests[0][0] == [7, 8, 9]


@pytest.mark.parametrize(
    "prompt", [["hello", "ab"], [encode("hello"), encode("ab")], [encode("hello"), "ab"]], ids=["text", "ids", "mixed"]
)
def test_batches_number_their_choices_prompt_by_prompt(
    api: openai.OpenAI, engine: ScriptedClient, prompt: list[object]
) -> None:
    extra = {"add_special_tokens": False}
    answer = api.completions.create(model=BASE, prompt=prompt, n=3, max_tokens=4, extra_body=extra)  # type: ignore[arg-type]
    assert [choice.index for choice in answer.choices] == list(range(6))
    starts = ["hello", "ahello", "abhello"]
    for choice in answer.choices:
        assert choice.text.startswith(starts[choice.index % 3][:4])
    assert [ids for ids, _, _ in engine.requests] == [encode("hello"), encode("ab")]
    assert answer.usage.prompt_tokens == len(encode("hello")) + len(encode("ab"))
    assert answer.usage.completion_tokens == 6 * 4


def test_streamed_batch_equals_the_whole_answer(api: openai.OpenAI) -> None:
    whole = api.completions.create(model=BASE, prompt=["a", "b"], n=2, max_tokens=50)
    texts, reasons = dict.fromkeys(range(4), ""), {}
    for chunk in api.completions.create(model=BASE, prompt=["a", "b"], n=2, max_tokens=50, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}


@pytest.mark.parametrize("model", ["sql", f"{BASE}:sql"])
def test_adapter_by_name(api: openai.OpenAI, model: str) -> None:
    answer = api.completions.create(model=model, prompt="x", max_tokens=30)
    assert answer.choices[0].text == ANSWERS["sql"]
    assert answer.model == model


def test_echo(api: openai.OpenAI) -> None:
    answer = api.completions.create(model=BASE, prompt="wörld ", echo=True, max_tokens=2)
    assert answer.choices[0].text == "wörld " + "hello w"
    of_ids = api.completions.create(model=BASE, prompt=encode("wörld "), echo=True, max_tokens=0)
    assert of_ids.choices[0].text == "wörld "
    assert of_ids.usage.completion_tokens == 0
    assert of_ids.choices[0].finish_reason == "length"


def test_echo_with_logprobs_and_no_new_tokens(api: openai.OpenAI, engine: ScriptedClient) -> None:
    prompt = "hello wörld"
    choice = api.completions.create(model=BASE, prompt=prompt, echo=True, logprobs=2, max_tokens=0).choices[0]
    assert choice.text == prompt
    logprobs = choice.logprobs
    assert logprobs.tokens == ["<|bos|>", "hello", " w", "bytes:\\xc3", "bytes:\\xb6", "r", "l", "d"]
    assert logprobs.text_offset == [0, 0, 5, 7, 7, 8, 9, 10]
    assert logprobs.token_logprobs == [None] + [-3.0] * 7
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[2] == {" w": -3.0, "^": -1.0, "_": -2.0}
    params = engine.requests[0][1]
    assert (params.prompt_logprobs, params.logprobs, params.max_tokens) == (2, 2, 0)


@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_point_into_the_text(api: openai.OpenAI, echo: bool) -> None:
    choice = api.completions.create(model=BASE, prompt="naïve ", echo=echo, logprobs=1, max_tokens=40).choices[0]
    logprobs = choice.logprobs
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert choice.text[offset : offset + len(token)] == token
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    assert all(len(top) == 2 for top in logprobs.top_logprobs if top)


def test_logprobs_0_tells_of_the_chosen_token_only(api: openai.OpenAI) -> None:
    logprobs = api.completions.create(model=BASE, prompt="x", logprobs=0, max_tokens=1).choices[0].logprobs
    assert logprobs.top_logprobs == [{"hello": -3.0}]


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_logprobs_equal_those_of_the_whole_answer(api: openai.OpenAI, echo: bool) -> None:
    asked = {"model": BASE, "prompt": "naïve ", "echo": echo, "logprobs": 2, "max_tokens": 40}
    whole = api.completions.create(**asked).choices[0].logprobs.model_dump()
    streamed: dict[str, list[object]] = {name: [] for name in whole}
    for chunk in api.completions.create(**asked, stream=True):
        for name, values in chunk.choices[0].logprobs.model_dump().items():
            streamed[name].extend(values)
    assert streamed == whole


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_the_text_and_end_the_sequence(
    api: openai.OpenAI, engine: ScriptedClient, stream: bool
) -> None:
    asked = {"model": BASE, "prompt": "x", "stop": ["wör", "zzz"], "max_tokens": 100}
    if stream:
        choices = [chunk.choices[0] for chunk in api.completions.create(**asked, stream=True)]
        text, last = "".join(choice.text for choice in choices), choices[-1]
    else:
        last = api.completions.create(**asked).choices[0]
        text = last.text
    assert text == "hello "
    assert last.finish_reason == "stop"
    assert last.stop_reason == "wör"  # type: ignore[union-attr]
    assert engine.closed_early.wait(60), "the engine went on after the stop string"


def test_a_stop_string_ends_its_own_sequence_only(api: openai.OpenAI, engine: ScriptedClient) -> None:
    answer = api.completions.create(model=BASE, prompt="x", n=2, stop="ah", max_tokens=10)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "stop"]
    assert answer.choices[1].text == ""
    assert answer.choices[0].text == FULL[:14]
    assert engine.aborts == [1], "the engine goes on with a sequence that is over"


def test_stop_string_in_the_output(api: openai.OpenAI) -> None:
    extra = {"include_stop_str_in_output": True}
    answer = api.completions.create(model=BASE, prompt="x", stop="wör", max_tokens=50, extra_body=extra)
    assert answer.choices[0].text == "hello wör"


def test_stop_ids_and_special_tokens(api: openai.OpenAI) -> None:
    comma = encode(",")[0]
    extra = {"stop_token_ids": [comma]}
    choice = api.completions.create(model=BASE, prompt="x", max_tokens=50, extra_body=extra).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", comma)  # type: ignore[attr-defined]
    extra = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    choice = api.completions.create(model=BASE, prompt="x", max_tokens=50, extra_body=extra).choices[0]
    assert choice.text == FULL + TOKENIZER.eos_token
    extra = {"ignore_eos": True}
    choice = api.completions.create(model=BASE, prompt="x", max_tokens=60, extra_body=extra).choices[0]
    assert choice.finish_reason == "length"


def test_sampling_fields_reach_the_engine(api: openai.OpenAI, engine: ScriptedClient) -> None:
    extra = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [3, 4],
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "prompt_logprobs": 1,
    }
    api.completions.create(
        model=BASE,
        prompt="x",
        n=2,
        temperature=0,
        top_p=0.5,
        presence_penalty=0.25,
        frequency_penalty=-1,
        seed=2**63,
        stop="###",
        max_tokens=3,
        logit_bias={"12": -100},
        logprobs=1,
        extra_body=extra,
    )
    params = engine.requests[0][1]
    for name, value in extra.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(params, name) == expected, name
    assert (params.n, params.temperature, params.top_p) == (2, 0, 0.5)
    assert (params.presence_penalty, params.frequency_penalty) == (0.25, -1)
    assert (params.seed, params.stop, params.max_tokens) == (2**63, ("###",), 3)
    assert params.logit_bias == {12: -100}


def test_null_is_a_fields_default(http: httpx.Client, engine: ScriptedClient) -> None:
    names = ["n", "temperature", "top_p", "top_k", "stop", "seed", "logprobs", "echo", "stream", "logit_bias", "user"]
    body = {"model": BASE, "prompt": "x", **dict.fromkeys(names)}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert engine.requests[0][1].temperature == 1.0


def test_token_ids_come_back_when_asked(http: httpx.Client) -> None:
    body = {"model": BASE, "prompt": "x", "max_tokens": 2, "return_token_ids": True, "prompt_logprobs": 1}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert choice["token_ids"] == encode("hello w")
    assert choice["prompt_token_ids"] == [0, *encode("x")]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second[str(encode("x")[0])] == {"logprob": -3.0, "rank": 3, "decoded_token": "x"}


def test_cached_tokens_are_reported(api: openai.OpenAI, engine: ScriptedClient) -> None:
    engine.prefix_hits = True
    answer = api.completions.create(model=BASE, prompt=[[5] * 40, [6] * 20], n=2, max_tokens=1)
    assert answer.usage.prompt_tokens == 60
    assert answer.usage.prompt_tokens_details.cached_tokens == 32 + 16


def test_ends_of_sequence_are_counted_but_not_shown(api: openai.OpenAI) -> None:
    extra = {"return_token_ids": True}
    answer = api.completions.create(model="sql", prompt="x", max_tokens=50, extra_body=extra)
    assert answer.choices[0].token_ids[-1] == EOS  # type: ignore[attr-defined]
    assert answer.choices[0].text == ANSWERS["sql"]
