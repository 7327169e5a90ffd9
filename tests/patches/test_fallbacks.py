"""What a selective batch does not cover runs PEFT's own path, with one logged line; bad calls get clear errors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import (
    DynamicCache,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaAttention

import peft_dist
from peft_dist.patches import drop_in
from peft_dist.patches.paged_cache import PagedCache
from tests.e2e.test_llm import make_tokenizer
from tests.patches import oracle
from tests.tiny_models import FAMILIES, VOCAB_SIZE


def lines(caplog: pytest.LogCaptureFixture, part: str) -> int:
    return sum(part in record.message for record in caplog.records if record.name == "peft_dist.patches")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "peft_dist.patches")
    return caplog


def with_adapters(*configs: LoraConfig) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["llama"](), configs[0], adapter_name="a0")
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{number}", config)
    return model.eval()


def config(**options: Any) -> LoraConfig:
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    return LoraConfig(r=2, init_lora_weights=False, **options)


def test_encoder_decoder(log: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    lora = LoraConfig(target_modules=["q", "v"], init_lora_weights=False, task_type=TaskType.SEQ_2_SEQ_LM)
    model = get_peft_model(base, lora, adapter_name="a0").eval()
    ids = torch.randint(3, 50, (2, 5))
    call = lambda: model.generate(input_ids=ids, adapter_names=["a0", "__base__"], max_new_tokens=4)  # noqa: E731
    expected = call()
    peft_dist.patch(model)
    assert torch.equal(call(), expected) and torch.equal(call(), expected)
    assert lines(log, "PeftModelForSeq2SeqLM is not a causal language model") == 1


def test_another_tuner(log: pytest.LogCaptureFixture) -> None:
    tuner = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    ours, theirs = (get_peft_model(FAMILIES["llama"](), tuner).eval() for _ in range(2))
    peft_dist.patch(ours)
    ids = oracle.inputs()["input_ids"]
    with torch.no_grad():
        for call in ({}, {"adapter_names": ["default"] * 5}):
            assert torch.equal(
                ours.generate(ids, max_new_tokens=3, **call), theirs.generate(ids, max_new_tokens=3, **call)
            )
            assert torch.equal(ours(ids, **call).logits, theirs(ids, **call).logits)
    assert lines(log, "the tuner is IA3Model") == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"lora_bias": True, "target_modules": ["fc1"]}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "ModulesToSaveWrapper"),
        ({"trainable_token_indices": [3, 4]}, "TrainableTokensWrapper"),
    ],
)
def test_adapters_that_only_peft_can_mix(options: dict[str, Any], reason: str, log: pytest.LogCaptureFixture) -> None:
    if options.get("lora_bias"):
        torch.manual_seed(0)
        model = get_peft_model(FAMILIES["gpt_neox"](), config(target_modules=["dense"], lora_bias=True), "a0").eval()
    else:
        model = with_adapters(config(**options), config())
    names = ["a0", "__base__"]
    inputs = oracle.inputs(2, padded=False)
    with torch.no_grad():
        expected = model(**inputs, adapter_names=names).logits
        peft_dist.patch(model)
        for _ in range(2):
            assert torch.equal(model(**inputs, adapter_names=names).logits, expected)
    assert lines(log, reason) == 1


def test_dora_is_refused_as_peft_refuses_it_and_its_neighbours_run(log: pytest.LogCaptureFixture) -> None:
    model = with_adapters(config(), config(use_dora=True))
    inputs = oracle.inputs(2, padded=False)
    with torch.no_grad():
        expected = model(**inputs, adapter_names=["a0", "__base__"]).logits
    peft_dist.patch(model)
    with pytest.raises(ValueError, match="DoRA"):
        model.generate(**inputs, adapter_names=["a1", "a0"])
    assert lines(log, "DoraLinearVariant") == 1
    with torch.no_grad():
        oracle.assert_logits_close(model(**inputs, adapter_names=["a0", "__base__"]).logits, expected)
    assert len(log.records) == 1


def test_training_mode_and_gradients(llama: PeftModel, log: pytest.LogCaptureFixture) -> None:
    peft_dist.patch(llama)
    inputs = oracle.inputs()
    llama.set_adapter("narrow")
    output = llama(**inputs, adapter_names=oracle.NAMES)
    assert output.logits.requires_grad and lines(log, "gradients are enabled") == 1
    llama.train()
    with pytest.raises(ValueError, match="training mode"):
        llama(**inputs, adapter_names=oracle.NAMES)
    assert lines(log, "training mode") == 1


def test_autocast(llama: PeftModel, log: pytest.LogCaptureFixture) -> None:
    inputs = oracle.inputs(padded=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = llama(**inputs, adapter_names=oracle.NAMES).logits
        actual = peft_dist.patch(llama)(**inputs, adapter_names=oracle.NAMES).logits
    assert torch.equal(actual, expected) and lines(log, "autocast") == 1


def test_num_return_sequences_works_on_pefts_path_too(log: pytest.LogCaptureFixture) -> None:
    model = with_adapters(config(), config())
    inputs, names = oracle.inputs(3), ["a0", "a1", "__base__"]
    repeated = {key: value.repeat_interleave(2, 0) for key, value in inputs.items()}
    options = {"do_sample": True, "max_new_tokens": 5}
    torch.manual_seed(1)
    expected = model.generate(**repeated, adapter_names=[n for n in names for _ in range(2)], **options)
    peft_dist.patch(model)
    next(m for n, m in model.named_modules() if n.endswith("lora_A.a0")).register_forward_hook(lambda *_: None)
    torch.manual_seed(1)
    assert torch.equal(model.generate(**inputs, adapter_names=names, num_return_sequences=2, **options), expected)
    assert lines(log, "forward hooks") == 1


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["wide", "sq1", "late", "wide", "x"], ValueError, r"sq1, x; known are __base__, late, narrow, wide"),
        (["wide"] * 4, ValueError, "4 and 5"),
        (["wide"] * 6, ValueError, "6 and 5"),
        ([], ValueError, "0 and 5"),
        ("wide", TypeError, "list of str"),
        ([None, "wide", "wide", "wide", "wide"], TypeError, "__base__"),
    ],
)
@pytest.mark.parametrize("generates", [False, True])
def test_bad_names_get_a_clear_error(
    names: Any, error: type[Exception], message: str, generates: bool, llama: PeftModel
) -> None:
    good = peft_dist.patch(llama).generate(**oracle.inputs(), adapter_names=oracle.NAMES, max_new_tokens=4)
    call = llama.generate if generates else llama
    with torch.no_grad(), pytest.raises(error, match=message):
        call(**oracle.inputs(), adapter_names=names)
    assert torch.equal(llama.generate(**oracle.inputs(), adapter_names=oracle.NAMES, max_new_tokens=4), good)


def test_call_that_fails_leaves_nothing_behind(make: Callable[..., PeftModel]) -> None:
    model = peft_dist.patch(make())
    before = model.config._attn_implementation

    def fail(*args: Any) -> None:
        raise RuntimeError("stop here")

    hook = model.get_base_model().model.layers[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        model.generate(**oracle.inputs(), adapter_names=oracle.NAMES)
    hook.remove()
    assert model.config._attn_implementation == before
    assert "forward" not in model.get_base_model().__dict__
    fresh = make().generate(**oracle.inputs(), adapter_names=oracle.NAMES, max_new_tokens=4)
    assert torch.equal(model.generate(**oracle.inputs(), adapter_names=oracle.NAMES, max_new_tokens=4), fresh)


def test_each_reason_is_logged_once_per_model(make: Callable[..., PeftModel], log: pytest.LogCaptureFixture) -> None:
    for model in (peft_dist.patch(make()), peft_dist.patch(make())):
        for _ in range(3):
            with model.disable_adapter():
                model.generate(**oracle.inputs(), adapter_names=oracle.NAMES, max_new_tokens=1)
    assert lines(log, "adapters are disabled") == 2
    assert drop_in.logger.name == "peft_dist.patches"


def test_an_argument_that_attention_does_not_know(
    make: Callable[..., PeftModel], log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As new architectures pass: the adapters still run as one batch, with Hugging Face's attention and cache."""
    original = LlamaAttention.forward
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, *a, **k: original(self, *a, invented=1, **k))
    call = {**oracle.inputs(), "adapter_names": oracle.NAMES, "max_new_tokens": 6, "min_new_tokens": 6}
    options = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    expected = make().generate(**call, **options)
    model = peft_dist.patch(make())
    for _ in range(2):
        actual = model.generate(**call, **options)
        assert torch.equal(actual.sequences, expected.sequences)
        assert type(actual.past_key_values) is DynamicCache
        oracle.assert_logits_close(torch.stack(actual.logits), torch.stack(expected.logits))
    assert lines(log, "cannot honour invented, which LlamaAttention (layer 0) passes: the adapters run") == 1


def test_the_tokenizer_of_stop_strings_is_no_argument_of_attention(
    make: Callable[..., PeftModel], log: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tokenizer()
    call = {**oracle.inputs(), "adapter_names": oracle.NAMES, "max_new_tokens": 6, "do_sample": False}
    stop = {"stop_strings": ["zz"], "tokenizer": tokenizer}
    expected = make().generate(**call, **stop)
    assert torch.equal(peft_dist.patch(make()).generate(**call, **stop), expected)
    assert lines(log, "cannot honour") == 0


def test_peft_leaves_no_hooks_when_its_own_path_fails(make: Callable[..., PeftModel]) -> None:
    """As it does without: later calls without names would go through the adapters of the one that failed."""
    call = {**oracle.inputs(), "max_new_tokens": 4, "do_sample": False}
    model = make()
    peft_dist.patch(model)
    expected = model.generate(**call)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="unknown_option"):
        model.generate(**call, adapter_names=oracle.NAMES, unknown_option=1)
    assert torch.equal(model.generate(**call), expected)
    seen: list[int] = []
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(1))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="unknown_option"):
        model.generate(**call, adapter_names=oracle.NAMES, unknown_option=1)
    assert torch.equal(model.generate(**call), expected) and seen, "the user's own hooks stay"
    peft_dist.unpatch(model)
    assert torch.equal(model.generate(**call), expected)


@pytest.mark.parametrize("kind", ["qwen2_moe", "phimoe"])
def test_a_window_that_only_the_mask_knows(kind: str, log: pytest.LogCaptureFixture) -> None:
    """Hugging Face builds a sliding mask for these models, whose attention never hears of the window."""

    def make() -> PeftModel:
        torch.manual_seed(0)
        sizes = {
            "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        if kind == "phimoe":
            base = PhimoeForCausalLM(PhimoeConfig(num_local_experts=4, **sizes))
        else:
            base = Qwen2MoeForCausalLM(
                Qwen2MoeConfig(
                    use_sliding_window=True, num_experts=4, moe_intermediate_size=16,
                    shared_expert_intermediate_size=16, **sizes,
                )
            )  # fmt: skip
        with torch.no_grad():
            for parameter in base.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.25)
        return get_peft_model(base, config(), adapter_name="a0").eval()

    call = {**oracle.inputs(3), "adapter_names": ["a0", "__base__", "a0"], "max_new_tokens": 8, "do_sample": False}
    expected = make().generate(**call)
    assert torch.equal(peft_dist.patch(make()).generate(**call), expected)
    assert lines(log, "sliding window, of which") == 1


def test_keys_and_values_of_two_shapes(
    make: Callable[..., PeftModel], log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache whose layer gets narrower values than keys."""
    model, expected = peft_dist.patch(make()), make()
    call = {**oracle.inputs(), "adapter_names": oracle.NAMES, "max_new_tokens": 4}
    answer = expected.generate(**call)
    update = PagedCache.update
    monkeypatch.setattr(PagedCache, "update", lambda self, k, v, *a, **more: update(self, k, v[..., :4], *a, **more))
    assert torch.equal(model.generate(**call), answer)
    assert lines(log, "one shape") == 1
