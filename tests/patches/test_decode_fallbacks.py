"""Passes that cannot be captured run operator by operator, with the same answers."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GenerationMixin
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRotaryEmbedding

import peft_dist
from peft_dist.patches.cache_name import CACHE
from peft_dist.patches.decode_graphs import DecodeGraphs
from tests.patches import oracle
from tests.patches.captures import NEW, assert_same, call, patched


def hook_on_a_layer(model: PeftModel, patch: pytest.MonkeyPatch) -> str:
    model.get_base_model().model.layers[1].register_forward_hook(lambda *_: None)
    return "has forward hooks"


def global_hook(model: PeftModel, patch: pytest.MonkeyPatch) -> str:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    patch.callback = handle.remove
    return "global forward hooks"


def forward_of_its_own(model: PeftModel, patch: pytest.MonkeyPatch) -> str:
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.forward = mlp.forward
    return "has a forward of its own"


def part_in_training_mode(model: PeftModel, patch: pytest.MonkeyPatch) -> str:
    model.get_base_model().model.norm.training = True
    return "is in training mode"


def dynamic_rope(model: PeftModel, patch: pytest.MonkeyPatch) -> str:
    patch.setattr(model.get_base_model().model.rotary_emb, "rope_type", "longrope", raising=False)
    patch.setattr(LlamaRotaryEmbedding, "forward", inspect.unwrap(LlamaRotaryEmbedding.forward))
    return "changes with the length"


def model_that_reads_the_length(model: PeftModel, patch: pytest.MonkeyPatch) -> str:
    original = LlamaForCausalLM.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs[CACHE].get_seq_length()
        return original(self, *args, **kwargs)

    patch.setattr(LlamaForCausalLM, "forward", forward)
    return "asks its cache for what changes"


def model_that_reads_the_mask(model: PeftModel, patch: pytest.MonkeyPatch) -> str:
    original = LlamaForCausalLM.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, attention_mask: torch.Tensor, **kwargs: Any) -> Any:
        attention_mask.sum()
        return original(self, *args, attention_mask=attention_mask, **kwargs)

    patch.setattr(LlamaForCausalLM, "forward", forward)
    return "reads its attention mask"


def model_that_answers_with_more(model: PeftModel, patch: pytest.MonkeyPatch) -> str:
    original = LlamaForCausalLM.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.attentions = (output.logits,)
        return output

    patch.setattr(LlamaForCausalLM, "forward", forward)
    return "answers with attentions, a tuple"


def capture_that_fails(model: PeftModel, patch: pytest.MonkeyPatch) -> str:
    def fail(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    model.__dict__["_peft_dist"].graphs = DecodeGraphs(lambda device: fail)
    return "not permitted when stream is capturing"


@pytest.mark.parametrize(
    "obstacle",
    [
        hook_on_a_layer,
        global_hook,
        forward_of_its_own,
        part_in_training_mode,
        dynamic_rope,
        model_that_reads_the_length,
        model_that_reads_the_mask,
        model_that_answers_with_more,
        capture_that_fails,
    ],
    ids=lambda obstacle: obstacle.__name__,
)
def test_what_cannot_be_captured_runs_as_before(
    obstacle: Callable[..., str],
    make: Callable[..., PeftModel],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = call(make())
    model, recorder = patched(make())
    reason = obstacle(model, monkeypatch)
    with caplog.at_level(logging.INFO, "peft_dist.patches"):
        try:
            for _ in range(2):
                assert_same(call(model), expected)
        finally:
            getattr(monkeypatch, "callback", lambda: None)()
    assert recorder.replayed == 0
    assert any(reason in record.message for record in caplog.records)


@pytest.mark.parametrize(
    "options", [{"output_hidden_states": True}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_passes_that_are_not_plain(options: dict[str, Any], make: Callable[..., PeftModel]) -> None:
    model, recorder = patched(make())
    assert_same(call(model, **options), call(make(), **options))
    assert recorder.replayed == 0


def test_a_family_that_asks_for_lengths(make: Callable[..., PeftModel]) -> None:
    """OPT does so whether it needs them or not; PEFT cannot mix adapters in it."""
    model, recorder = patched(make("opt"))
    assert_same(call(model), call(peft_dist.patch(make("opt"))))
    assert recorder.replayed == 0


def test_hidden_states_in_one_call_do_not_keep_the_next_from_being_captured(make: Callable[..., PeftModel]) -> None:
    model, recorder = patched(make())
    call(model, output_hidden_states=True)
    assert_same(call(model), call(make()))
    assert recorder.replayed == NEW - 1


def test_several_new_tokens_and_single_ones_in_turn(make: Callable[..., PeftModel]) -> None:
    """Assisted decoding: candidates are checked in one pass, and taken back where they were wrong."""
    options = {"max_new_tokens": 30, "min_new_tokens": 30}
    model, _ = patched(make())
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = call(make(), ["wide"], inputs=inputs, **options)
    found = call(model, ["wide"], inputs=inputs, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(found.sequences, expected.sequences)


def test_a_mask_that_hides_a_new_token(make: Callable[..., PeftModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of the model's own may write zeros: its masks are read, and such a pass is Hugging Face's."""

    def update(self: Any, outputs: Any, kwargs: dict[str, Any], **options: Any) -> dict[str, Any]:
        kwargs = GenerationMixin._update_model_kwargs_for_generation(self, outputs, kwargs, **options)
        if kwargs["attention_mask"].shape[1] == oracle.PROMPT + 3:
            kwargs["attention_mask"][:, -1] = 0
        return kwargs

    monkeypatch.setattr(LlamaForCausalLM, "_update_model_kwargs_for_generation", update)
    model, recorder = patched(make())
    assert_same(call(model), call(make()))
    assert recorder.replayed == 2


def test_a_prompt_in_single_tokens_is_read_token_by_token(make: Callable[..., PeftModel]) -> None:
    inputs = oracle.inputs(padded=False)
    inputs["attention_mask"][1, 5] = 0
    options = {"prefill_chunk_size": 1, "inputs": inputs}
    model, _ = patched(make())
    assert_same(call(model, **options), call(make(), **options))


def test_passes_outside_of_generates_own_cache_are_not_captured(make: Callable[..., PeftModel]) -> None:
    """Guidance runs a second cache beside the first, whose blocks lie elsewhere."""
    model, recorder = patched(make())
    assert_same(call(model, guidance_scale=1.5), call(make(), guidance_scale=1.5))
    assert recorder.replayed == NEW - 1
