"""Captured decode passes give the answers of passes that run operator by operator, and give way to those."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import DynamicCache

import peft_dist
from peft_dist.patches.decode_graphs import capture_for
from peft_dist.patches.paged_cache import PagedRows
from tests.patches import oracle
from tests.patches.captures import NEW, assert_same, call, patched
from tests.patches.test_generate import OPTIONS
from tests.patches.test_mutable_weights import CHANGES
from tests.tiny_models import NUM_LAYERS


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "qwen3"])
def test_every_decode_pass_is_replayed_and_a_second_call_captures_nothing(
    family: str, make: Callable[..., PeftModel]
) -> None:
    expected = call(make(family))
    model, recorder = patched(make(family))
    for number in (1, 2):
        assert_same(call(model), expected)
        assert (recorder.captured, recorder.replayed) == (1, number * (NEW - 1))


def test_other_adapters_and_prompts_use_the_same_capture(make: Callable[..., PeftModel]) -> None:
    (model, recorder), plain = patched(make()), make()
    call(model)
    names = ["late", "wide", "narrow", "narrow", "__base__"]
    inputs = oracle.inputs(seed=5)
    assert_same(call(model, names, inputs=inputs), call(plain, names, inputs=inputs))
    assert recorder.captured == 1


def test_rows_without_adapters_and_other_batches_have_captures_of_their_own(make: Callable[..., PeftModel]) -> None:
    (model, recorder), plain = patched(make()), make()
    batches = {
        ("wide", "narrow", "late"): 1,
        ("__base__",) * 3: 2,
        ("wide",) * 3: 3,
        ("late",) * 3: 3,
        ("late",) * 2: 4,
    }
    for names, captured in batches.items():
        assert_same(call(model, list(names)), call(plain, list(names)))
        assert recorder.captured == captured


@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in ("no cache", "static cache")])
def test_options_of_generate(option: str, make: Callable[..., PeftModel]) -> None:
    options = {"max_new_tokens": NEW, "min_new_tokens": 0, **OPTIONS[option]}
    if option == "chunked prefill":
        # Padding at the end of the first chunk leaves the cache to Hugging Face.
        options["inputs"] = oracle.inputs(padded=False)
    model, recorder = patched(make())
    expected = call(make(), **options)
    for _ in range(2):
        assert_same(call(model, **options), expected)
    assert recorder.replayed


def test_beams_that_change_their_rows(make: Callable[..., PeftModel]) -> None:
    options = {"num_beams": 4, "max_new_tokens": 40, "min_new_tokens": 40}
    model, recorder = patched(make())
    assert torch.equal(call(model, **options).sequences, call(make(), **options).sequences)
    assert recorder.replayed == 39


def test_blocks_are_enough_from_the_start_and_are_kept(make: Callable[..., PeftModel]) -> None:
    model, recorder = patched(make())
    graphs = model.__dict__["_peft_dist"].graphs
    call(model, max_new_tokens=100, min_new_tokens=100)
    memory, blocks = graphs.memory, graphs.memory.num_blocks
    assert memory.version == NUM_LAYERS and recorder.captured == 1
    assert_same(call(model), call(make()))
    assert graphs.memory is memory and memory.num_blocks == blocks and memory.version == NUM_LAYERS


def test_a_longer_call_takes_more_memory_and_captures_again(make: Callable[..., PeftModel]) -> None:
    (model, recorder), plain = patched(make()), make()
    call(model)
    for options in ({"max_new_tokens": 60, "min_new_tokens": 60}, {}):
        assert_same(call(model, **options), call(plain, **options))
    assert recorder.captured == 2


def test_memory_that_grows_within_a_call(make: Callable[..., PeftModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dist.patches.selective_call.blocks_for", lambda *_: 6)
    model, recorder = patched(make())
    options = {"max_new_tokens": 60, "min_new_tokens": 60}
    assert_same(call(model, **options), call(make(), **options))
    assert recorder.captured > 1 and recorder.replayed == 59


def test_the_returned_cache_is_hugging_faces(make: Callable[..., PeftModel]) -> None:
    (model, _), plain = patched(make()), make()
    actual, expected = call(model).past_key_values, call(plain).past_key_values
    assert type(actual) is DynamicCache and actual.get_seq_length() == expected.get_seq_length()
    before = [layer.keys.clone() for layer in actual.layers]
    call(model, inputs=oracle.inputs(seed=9))
    assert all(torch.equal(layer.keys, kept) for layer, kept in zip(actual.layers, before, strict=True))
    row = expected.layers[2].keys[0]
    oracle.assert_logits_close(actual.layers[2].keys[0], row)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_weights_is_seen(
    change: Callable[..., None], make: Callable[..., PeftModel], adapters: dict[str, dict[str, Path]]
) -> None:
    (model, recorder), plain = patched(make()), make()
    call(model)
    for changed in (model, plain):
        change(changed, adapters["llama"])
    assert_same(call(model), call(plain))
    assert recorder.replayed == 2 * (NEW - 1)


@pytest.mark.parametrize("replaces", [False, True])
def test_a_base_weight_that_lies_elsewhere_is_seen(replaces: bool, make: Callable[..., PeftModel]) -> None:
    (model, recorder), plain = patched(make()), make()
    call(model)
    for changed in (model, plain):
        layer = changed.get_base_model().model.layers[1].mlp.up_proj.base_layer
        if replaces:
            layer.weight = torch.nn.Parameter(layer.weight.detach() * -0.5)
        else:
            layer.weight.data = layer.weight.data * -0.5
    assert_same(call(model), call(plain))
    assert recorder.captured == 2


def test_hooks_of_the_model_itself_run_around_captured_passes(make: Callable[..., PeftModel]) -> None:
    model, recorder = patched(make())
    seen: list[Any] = []
    model.get_base_model().register_forward_hook(lambda module, args, output: seen.append(output))
    answer = call(model)
    assert recorder.replayed == NEW - 1 and len(seen) == NEW
    for output, logits in zip(seen, answer.logits, strict=True):
        assert type(output) is type(seen[0]) and output.past_key_values is answer.past_key_values
        assert torch.equal(output.logits[:, -1].float(), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_seen(dtype: torch.dtype, make: Callable[..., PeftModel]) -> None:
    (model, recorder), plain = patched(make()), peft_dist.patch(make())
    call(model)
    actual, expected = call(model.to(dtype)), call(plain.to(dtype))
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(torch.stack(actual.logits), torch.stack(expected.logits))
    assert (recorder.captured, recorder.replayed) == (2, 2 * (NEW - 1))


def test_adapters_that_come_later(make: Callable[..., PeftModel], adapters: dict[str, dict[str, Path]]) -> None:
    (model, recorder), plain = patched(make()), make()
    call(model)
    for loaded in (model, plain):
        loaded.load_adapter(adapters["llama"]["spare"], adapter_name="spare")
        loaded.eval()
    names = ["spare", "wide", "__base__", "spare", "late"]
    assert_same(call(model, names), call(plain, names))
    assert recorder.replayed == 2 * (NEW - 1)


def test_the_mask_is_read_once_a_call(make: Callable[..., PeftModel], monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = peft_dist.patches.selective_call._new_tokens
    monkeypatch.setattr("peft_dist.patches.selective_call._new_tokens", lambda *a: read.append(a[1:]) or original(*a))
    model, _ = patched(make())
    call(model)
    assert read == [(5, oracle.PROMPT)]


def test_inference_mode_in_one_call_and_not_in_the_next(make: Callable[..., PeftModel]) -> None:
    (model, recorder), expected = patched(make()), call(make())
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            assert_same(call(model), expected)
    assert recorder.captured == 1


@pytest.fixture
def precision() -> Iterator[Any]:
    """torch's own setting, for float32 products on a GPU."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


def test_another_precision_of_products_is_captured_anew(make: Callable[..., PeftModel], precision: Any) -> None:
    model, recorder = patched(make())
    for captured, value in ((1, "ieee"), (2, "tf32"), (2, "tf32")):
        precision.fp32_precision = value
        call(model)
        assert recorder.captured == captured


def test_another_configuration_is_captured_anew(make: Callable[..., PeftModel]) -> None:
    (model, recorder), plain = patched(make("gemma2")), make("gemma2")
    call(model)
    for changed in (model, plain):
        changed.config.final_logit_softcapping = 3.0
    assert_same(call(model), call(plain))
    assert recorder.captured == 2


def test_unpatch_gives_the_memory_back(make: Callable[..., PeftModel]) -> None:
    model, _ = patched(make())
    call(model)
    graphs = model.__dict__["_peft_dist"].graphs
    assert graphs.memory.num_bytes and graphs.num_graphs == 1
    peft_dist.unpatch(model)
    assert graphs.memory is None and graphs.num_graphs == 0


def test_memory_that_is_too_much_is_not_kept(make: Callable[..., PeftModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_dist.patches.kv_memory.KVMemory.may_be_kept", False)
    (model, recorder), expected = patched(make()), call(make())
    for captured in (1, 2):
        assert_same(call(model), expected)
        assert recorder.captured == captured and model.__dict__["_peft_dist"].graphs.memory is None


def test_nothing_is_captured_on_a_cpu_and_memory_grows_as_it_is_needed(
    make: Callable[..., PeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    original = PagedRows.__init__
    monkeypatch.setattr(PagedRows, "__init__", lambda self, *a: made.append(self) or original(self, *a))
    call(peft_dist.patch(make()), max_new_tokens=200)
    assert capture_for(torch.device("cpu")) is None
    assert made[0].memory.version > NUM_LAYERS
