"""``/v1/chat/completions`` through the ``openai`` client."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from peft_dist.api.options import ServerOptions
from tests.api.http_support import ANSWERS, BASE, TOKENIZER, ScriptedClient, encode, serving

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def rendered(engine: ScriptedClient, number: int = 0) -> str:
    return str(TOKENIZER.decode(engine.requests[number][0]))


def test_the_models_template_makes_the_prompt(api: openai.OpenAI, engine: ScriptedClient) -> None:
    messages = [{"role": "system", "content": "be nice"}, *HELLO]
    answer = api.chat.completions.create(model=BASE, messages=messages)
    expected = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert engine.requests[0][0] == expected
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", ANSWERS[None])
    assert choice.finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(expected)


def test_without_a_limit_all_that_is_left_may_be_drawn(api: openai.OpenAI, engine: ScriptedClient) -> None:
    api.chat.completions.create(model=BASE, messages=HELLO)
    assert engine.requests[0][1].max_tokens == 512 - len(engine.requests[0][0])


def test_both_names_of_the_limit(api: openai.OpenAI, engine: ScriptedClient) -> None:
    api.chat.completions.create(model=BASE, messages=HELLO, max_tokens=3)
    api.chat.completions.create(model=BASE, messages=HELLO, max_completion_tokens=4)
    answer = api.chat.completions.create(model=BASE, messages=HELLO, max_completion_tokens=5, max_tokens=3)
    assert [params.max_tokens for _, params, _ in engine.requests] == [3, 4, 5]
    assert answer.usage.completion_tokens == 5


def test_content_in_parts_and_all_roles(api: openai.OpenAI, engine: ScriptedClient) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages: list[Any] = [
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": parts, "name": "ann"},
        {"role": "assistant", "content": "so?", "tool_calls": None, "refusal": None},
        *HELLO,
    ]
    api.chat.completions.create(model=BASE, messages=messages)
    text = rendered(engine)
    assert "<|im_start|>system\nrules<|im_end|>" in text
    assert "<|im_start|>user\none\ntwo<|im_end|>" in text
    assert "<|im_start|>assistant\nso?<|im_end|>" in text


def test_parts_that_are_text_under_another_name(api: openai.OpenAI, engine: ScriptedClient) -> None:
    parts = [
        {"type": "input_text", "text": "one"},
        {"type": "refusal", "refusal": "no"},
        {"type": "text", "text": "two"},
    ]
    api.chat.completions.create(model=BASE, messages=[{"role": "assistant", "content": parts}, *HELLO])
    assert "<|im_start|>assistant\none\nno\ntwo<|im_end|>" in rendered(engine)


def test_a_stream_tells_the_prompts_ids_first(api: openai.OpenAI, engine: ScriptedClient) -> None:
    extra = {"return_token_ids": True}
    chunks = list(api.chat.completions.create(model=BASE, messages=HELLO, stream=True, max_tokens=2, extra_body=extra))
    assert [chunk.choices[0].model_dump().get("prompt_token_ids") for chunk in chunks] == [
        engine.requests[0][0],
        *[None] * (len(chunks) - 1),
    ]


def test_an_answer_can_be_sent_back_as_history(api: openai.OpenAI, engine: ScriptedClient) -> None:
    answer = api.chat.completions.create(model=BASE, messages=HELLO)
    history = [*HELLO, answer.choices[0].message.model_dump(), *HELLO]
    api.chat.completions.create(model=BASE, messages=history)
    assert f"assistant\n{ANSWERS[None]}<|im_end|>" in rendered(engine, 1)


def test_generation_prompt_and_continuation(api: openai.OpenAI, engine: ScriptedClient) -> None:
    api.chat.completions.create(model=BASE, messages=HELLO, extra_body={"add_generation_prompt": False})
    assert rendered(engine).endswith("<|im_end|>\n")
    messages: list[Any] = [*HELLO, {"role": "assistant", "content": "I was say"}]
    api.chat.completions.create(model=BASE, messages=messages, extra_body={"continue_final_message": True})
    assert rendered(engine, 1).endswith("assistant\nI was say")


def test_template_variables(api: openai.OpenAI, engine: ScriptedClient) -> None:
    extra = {"chat_template_kwargs": {"suffix_note": "[note]"}}
    api.chat.completions.create(model=BASE, messages=HELLO, extra_body=extra)
    assert "[note]<|im_start|>assistant" in rendered(engine)


def test_template_and_role_of_the_operator(engine: ScriptedClient) -> None:
    options = ServerOptions(chat_template="{{ messages[0].content }}!", response_role="bot")
    with serving(engine, options) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as api:
        answer = api.chat.completions.create(model=BASE, messages=HELLO)
        assert rendered(engine) == "hello!"
        assert answer.choices[0].message.role == "bot"


def test_adapter_and_n(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model="json", messages=HELLO, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.message.content for choice in answer.choices] == [ANSWERS["json"], "a" + ANSWERS["json"]]


def test_logprobs_with_bytes(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(model=BASE, messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=4)
    content = answer.choices[0].logprobs.content
    assert [entry.token for entry in content] == ["hello", " w", "\ufffd", "\ufffd"]
    assert b"".join(bytes(entry.bytes) for entry in content).decode() == "hello wö"
    assert [entry.logprob for entry in content] == [-3.0] * 4
    assert [top.logprob for top in content[0].top_logprobs] == [-1.0, -2.0]


def test_the_chosen_token_is_among_the_top_only_by_rank(api: openai.OpenAI) -> None:
    def top(count: int | None) -> list[str]:
        answer = api.chat.completions.create(
            model=BASE, messages=HELLO, logprobs=True, max_tokens=1, **({"top_logprobs": count} if count else {})
        )
        return [entry.token for entry in answer.choices[0].logprobs.content[0].top_logprobs]

    assert top(None) == []
    assert "hello" not in top(2)
    assert top(3)[2] == "hello"


def test_stream(api: openai.OpenAI) -> None:
    chunks = list(api.chat.completions.create(model=BASE, messages=HELLO, stream=True))
    first, last = chunks[0].choices[0], chunks[-1].choices[0]
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWERS[None]
    assert (last.finish_reason, last.delta.content) == ("stop", None)
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    assert not any("\ufffd" in (chunk.choices[0].delta.content or "") for chunk in chunks)


def test_stream_with_usage(api: openai.OpenAI) -> None:
    chunks = list(
        api.chat.completions.create(
            model=BASE, messages=HELLO, stream=True, max_tokens=5, stream_options={"include_usage": True}
        )
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 0


def test_running_usage(api: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = api.chat.completions.create(model=BASE, messages=HELLO, stream=True, max_tokens=3, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in stream]
    assert counts[0] == 0 and counts[-1] == 3 and counts == sorted(counts)


@pytest.mark.parametrize("n", [1, 3])
def test_stream_equals_the_whole_answer(api: openai.OpenAI, n: int) -> None:
    asked: dict[str, Any] = {"model": BASE, "messages": HELLO, "n": n, "logprobs": True, "top_logprobs": 1}
    whole = api.chat.completions.create(**asked)
    texts, tokens, roles = [""] * n, [[] for _ in range(n)], [0] * n
    for chunk in api.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role is not None
            tokens[choice.index] += [entry.token for entry in (choice.logprobs.content if choice.logprobs else [])]
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [[entry.token for entry in choice.logprobs.content] for choice in whole.choices]
    assert roles == [1] * n


def test_prompt_logprobs_and_ids(http: httpx.Client, engine: ScriptedClient) -> None:
    body = {"model": BASE, "messages": HELLO, "max_tokens": 1, "prompt_logprobs": 0, "return_token_ids": True}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["prompt_token_ids"] == engine.requests[0][0]
    assert answer["choices"][0]["token_ids"] == encode("hello")
    assert answer["prompt_logprobs"][0] is None
    assert len(answer["prompt_logprobs"]) == len(engine.requests[0][0])


def test_long_conversations_are_tokenised_in_a_thread(engine: ScriptedClient) -> None:
    options = ServerOptions(tokenize_in_thread_chars=1)
    with serving(engine, options) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as api:
        api.chat.completions.create(model=BASE, messages=HELLO)
        api.completions.create(model=BASE, prompt=["hello", [5]])  # type: ignore[list-item]
    expected = TOKENIZER.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert [ids for ids, _, _ in engine.requests] == [expected, [0, *encode("hello")], [5]]
