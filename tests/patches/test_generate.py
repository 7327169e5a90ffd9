"""Everything around the layers is Hugging Face's: each option of generate gives what PEFT gives."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import peft_dist
from peft_dist.patches.paged_cache import PagedCache
from tests.patches import oracle

FAMILIES = ["llama", "mistral", "gemma3", "gpt2"]


class BanEven(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, ::2] = -torch.inf
        return scores


class StopAtLength(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= oracle.PROMPT + 5)


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def both(model: PeftModel, inputs: dict[str, torch.Tensor], names: list[str], **options: Any) -> tuple[Any, Any]:
    """PEFT's answer and then the patched model's, from the same seed."""
    answers = []
    for change in (lambda m: m, peft_dist.patch):
        change(model)
        torch.manual_seed(7)
        answers.append(model.generate(**inputs, adapter_names=names, **options))
    return answers[0], answers[1]


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3, "do_sample": False},
    "beams of which two return": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "do_sample": False},
    "eos": {"do_sample": False, "eos_token_id": list(range(3, 40)), "pad_token_id": 0},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 5},
    "guidance": {"do_sample": False, "guidance_scale": 1.5},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "min length": {"do_sample": False, "min_new_tokens": 8},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("option", OPTIONS)
def test_option_gives_what_peft_gives(family: str, option: str, make: Callable[..., PeftModel]) -> None:
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True, **OPTIONS[option]}
    expected, actual = both(make(family), oracle.inputs(), oracle.NAMES, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    oracle.assert_logits_close(torch.stack(actual.scores), torch.stack(expected.scores))


def test_processors_criteria_and_outputs(llama: PeftModel) -> None:
    expected, actual = both(
        llama,
        oracle.inputs(),
        oracle.NAMES,
        max_new_tokens=9,
        logits_processor=LogitsProcessorList([BanEven()]),
        stopping_criteria=StoppingCriteriaList([StopAtLength()]),
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        output_hidden_states=True,
    )
    assert actual.sequences.shape[1] == oracle.PROMPT + 5
    assert (actual.sequences[:, oracle.PROMPT :] % 2 == 1).all()
    assert torch.equal(actual.sequences, expected.sequences)
    tokens = oracle.inputs()["attention_mask"].bool()
    for step, (ours, theirs) in enumerate(zip(actual.hidden_states, expected.hidden_states, strict=True)):
        for layer in range(len(theirs)):
            chosen = (ours[layer][tokens], theirs[layer][tokens]) if step == 0 else (ours[layer], theirs[layer])
            oracle.assert_logits_close(*chosen)
    assert type(actual) is type(expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_returned_cache_is_hugging_faces_and_can_be_continued(family: str, make: Callable[..., PeftModel]) -> None:
    model, inputs = make(family), oracle.inputs()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    expected, actual = both(model, inputs, oracle.NAMES, **options)
    assert type(actual.past_key_values) is DynamicCache
    ones = torch.ones(len(oracle.NAMES), 6, dtype=torch.long)
    full_mask = torch.cat([inputs["attention_mask"], ones], dim=1)
    for ours, theirs in zip(actual.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert ours.keys.shape == theirs.keys.shape
        seen = full_mask[:, :-1][:, -ours.keys.shape[2] :].bool()
        oracle.assert_logits_close(ours.keys.transpose(1, 2)[seen], theirs.keys.transpose(1, 2)[seen])
    peft_dist.unpatch(model)
    continued = []
    for answer, change in ((expected, peft_dist.unpatch), (actual, peft_dist.patch)):
        change(model)
        continued.append(
            model.generate(
                answer.sequences,
                attention_mask=full_mask,
                past_key_values=answer.past_key_values,
                adapter_names=oracle.NAMES,
                max_new_tokens=4,
                do_sample=False,
            )
        )
    assert torch.equal(continued[0], continued[1])


@pytest.mark.parametrize("sample", [False, True])
def test_num_return_sequences_expands_names_row_by_row(
    llama: PeftModel, make: Callable[..., PeftModel], sample: bool
) -> None:
    inputs, count = oracle.inputs(), 3
    with pytest.raises(ValueError, match="adapter_names"):
        make().generate(**inputs, adapter_names=oracle.NAMES, num_return_sequences=count, do_sample=True)
    repeated = {key: value.repeat_interleave(count, 0) for key, value in inputs.items()}
    torch.manual_seed(3)
    expected = llama.generate(
        **repeated, adapter_names=[n for n in oracle.NAMES for _ in range(count)], max_new_tokens=8, do_sample=sample
    )
    peft_dist.patch(llama)
    options: dict[str, Any] = {"num_return_sequences": count, "max_new_tokens": 8, "do_sample": sample}
    if not sample:
        options |= {"num_beams": count, "num_return_sequences": 1}
        peft_dist.unpatch(llama)
        expected = llama.generate(**inputs, adapter_names=oracle.NAMES, **options)
        peft_dist.patch(llama)
    torch.manual_seed(3)
    assert torch.equal(llama.generate(**inputs, adapter_names=oracle.NAMES, **options), expected)


def test_settings_may_come_in_a_generation_config(llama: PeftModel) -> None:
    inputs = oracle.inputs()
    expected = llama.generate(**inputs, adapter_names=oracle.NAMES, num_beams=2, max_new_tokens=6)
    peft_dist.patch(llama)
    config = GenerationConfig(num_beams=2, max_new_tokens=6, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    assert torch.equal(llama.generate(**inputs, adapter_names=oracle.NAMES, generation_config=config), expected)


def test_streamer_gets_the_tokens_of_a_single_row(llama: PeftModel) -> None:
    inputs = oracle.inputs(rows=1)
    peft_dist.patch(llama)
    streamer = Collect()
    answer = llama.generate(**inputs, adapter_names=["narrow"], streamer=streamer, max_new_tokens=6)
    assert streamer.tokens == answer[0].tolist() and streamer.ended


def test_inputs_may_be_embeddings(llama: PeftModel) -> None:
    generator = torch.Generator().manual_seed(5)
    inputs = {"inputs_embeds": torch.randn(3, 7, 32, generator=generator)}
    expected, actual = both(llama, inputs, ["wide", "__base__", "late"], max_new_tokens=6, do_sample=False)
    assert torch.equal(actual, expected)


def test_prompt_lookup_gives_the_greedy_tokens(llama: PeftModel) -> None:
    inputs = oracle.inputs(rows=1)
    expected, actual = both(llama, inputs, ["wide"], max_new_tokens=12, do_sample=False)
    found = llama.generate(
        **inputs, adapter_names=["wide"], max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=2
    )
    assert torch.equal(found, expected) and torch.equal(actual, expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_right_padding_is_answered_as_peft_does(family: str, make: Callable[..., PeftModel]) -> None:
    inputs = oracle.inputs(padded=False)
    inputs["attention_mask"][1, -4:] = 0
    inputs["attention_mask"][2, 3:6] = 0
    expected, actual = both(make(family), inputs, oracle.NAMES, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(actual, expected)


def test_attention_weights_are_hugging_faces(llama: PeftModel, caplog: pytest.LogCaptureFixture) -> None:
    llama.set_attn_implementation("eager")
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_attentions": True}
    with caplog.at_level(logging.WARNING, "peft_dist.patches"):
        expected, actual = both(llama, oracle.inputs(), oracle.NAMES, **options)
    for ours, theirs in zip(actual.attentions[-1], expected.attentions[-1], strict=True):
        oracle.assert_logits_close(ours, theirs)
    assert torch.equal(actual.sequences, expected.sequences)
    assert sum("attention weights" in record.message for record in caplog.records) == 1


def test_attention_weights_may_be_asked_for_in_a_config(llama: PeftModel) -> None:
    llama.set_attn_implementation("eager")
    config = GenerationConfig(
        max_new_tokens=4, return_dict_in_generate=True, output_attentions=True, pad_token_id=0, eos_token_id=2
    )
    expected, actual = both(llama, oracle.inputs(), oracle.NAMES, generation_config=config)
    for ours, theirs in zip(actual.attentions[-1], expected.attentions[-1], strict=True):
        oracle.assert_logits_close(ours, theirs)


def test_generation_uses_a_paged_cache_and_leaves_the_attention_setting(
    llama: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(PagedCache, "adopt", classmethod(_spy(seen, PagedCache.adopt.__func__)))
    before = llama.config._attn_implementation
    peft_dist.patch(llama).generate(**oracle.inputs(), adapter_names=oracle.NAMES, max_new_tokens=2)
    assert len(seen) == 1
    assert llama.config._attn_implementation == before == "sdpa"
    assert "forward" not in llama.get_base_model().__dict__


def _spy(seen: list[Any], function: Any) -> Any:
    def adopt(cls: type, *args: Any) -> Any:
        seen.append(function(cls, *args))
        return seen[-1]

    return adopt
