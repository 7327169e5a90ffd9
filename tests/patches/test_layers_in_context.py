"""Adapted layers where the rows, the order of calls or a user's hooks are not those of a plain decoder."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertLMHeadModel

import peft_dist
from tests.patches import oracle
from tests.tiny_models import VOCAB_SIZE


def bert() -> PeftModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        is_decoder=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    lora = LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(BertLMHeadModel(config), lora, adapter_name="a0")
    model.add_adapter("a1", lora)
    return model.eval()


def test_layers_between_decoder_and_head_see_the_kept_rows(caplog: pytest.LogCaptureFixture) -> None:
    """BERT's head has a linear layer of its own."""
    inputs, names = oracle.inputs(3), ["a0", "__base__", "a1"]
    call = {"adapter_names": names, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ours, theirs = peft_dist.patch(bert()), bert()
    assert "cls.predictions.transform.dense" in ours.targeted_module_names
    assert torch.equal(ours.generate(**inputs, **call), theirs.generate(**inputs, **call))
    with torch.no_grad():
        for kept in (0, 1, 3):
            expected = theirs(**inputs, adapter_names=names, logits_to_keep=kept).logits
            actual = ours(**inputs, adapter_names=names, logits_to_keep=kept).logits
            oracle.assert_logits_close(actual, expected)
    assert not caplog.records


@pytest.mark.parametrize("hooked", ["q_proj", "k_proj", "v_proj", "v_proj.base_layer"])
def test_a_layer_with_hooks_runs_alone_and_every_layer_once(hooked: str, make: Callable[..., PeftModel]) -> None:
    """q/k/v are computed together: a hook that changes one's input must not run the others again."""

    def prepare(model: PeftModel) -> dict[str, int]:
        attention, counts = model.get_base_model().model.layers[1].self_attn, {}
        attention.get_submodule(hooked).register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        for name in ("q_proj", "k_proj", "v_proj"):

            def count(module: nn.Module, args: object, output: object, name: str = name) -> None:
                counts[name] = counts.get(name, 0) + 1

            attention.get_submodule(name).base_layer.register_forward_hook(count)
        return counts

    inputs, ours, theirs = oracle.inputs(padded=False), make(), make()
    prepare(theirs)
    counts = prepare(peft_dist.patch(ours))
    with torch.no_grad():
        expected = theirs(**inputs, adapter_names=oracle.NAMES).logits
        actual = ours(**inputs, adapter_names=oracle.NAMES).logits
    oracle.assert_logits_close(actual, expected)
    assert counts == {"q_proj": 1, "k_proj": 1, "v_proj": 1}


def test_one_hooked_layer_leaves_its_siblings_together(make: Callable[..., PeftModel]) -> None:
    model = peft_dist.patch(make())
    attention = model.get_base_model().model.layers[1].self_attn
    attention.v_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    order: list[str] = []
    for name in ("q_proj", "k_proj", "v_proj"):
        base, layer = attention.get_submodule(name).base_layer, attention.get_submodule(name)
        original = base.forward
        base.forward = lambda x, original=original, name=name: (order.append(f"{name} multiplied"), original(x))[1]
        layer.register_forward_hook(lambda module, args, output, name=name: order.append(f"{name} called"))
    with torch.no_grad():
        model(**oracle.inputs(padded=False), adapter_names=oracle.NAMES)
    assert order == [
        "q_proj multiplied",
        "k_proj multiplied",
        "q_proj called",
        "k_proj called",
        "v_proj multiplied",
        "v_proj called",
    ]
