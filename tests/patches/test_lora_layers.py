"""Selective layers around stock modules, and in the place of PEFT's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear

from peft_dist.forward_context import ForwardContext
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.kernels.types import LoRAPlan
from peft_dist.patches.lora_layers import SelectiveEmbedding, SelectiveLinear
from peft_dist.patches.lora_wrapping import can_wrap, make_layer, restore_class, swap_class, unwrap_module, wrap_module
from tests.patches import oracle
from tests.tiny_models import FAMILIES, target_modules


@pytest.mark.parametrize("family", FAMILIES)
def test_wrapping_changes_nothing_and_unwrapping_restores(family: str) -> None:
    model = FAMILIES[family]()
    ids = oracle.inputs()["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        targets = set(target_modules(family))
        found = [(n, m) for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in targets and can_wrap(m)]
        layers = [wrap_module(model, path) for path, _ in found]
        assert torch.equal(model(ids).logits, expected)
        with ForwardContext():
            assert torch.equal(model(ids).logits, expected)
    assert [layer.is_output for layer in layers].count(True) == 1
    assert all(wrap_module(model, path) is layer for (path, _), layer in zip(found, layers, strict=True))
    assert all(unwrap_module(model, path) is module for path, module in found)
    assert all(model.get_submodule(path) is module for path, module in found)


def test_a_layer_made_beforehand_changes_nothing_until_it_is_put_in() -> None:
    model, path = FAMILIES["llama"](), "model.layers.0.self_attn.q_proj"
    base = model.get_submodule(path)
    made = make_layer(model, path)
    assert model.get_submodule(path) is base and made.base_layer is base
    assert wrap_module(model, path, made) is made is model.get_submodule(path)
    assert wrap_module(model, path, made) is make_layer(model, path) is made, "it is there already"
    unwrap_module(model, path)
    other = torch.nn.Linear(32, 32)
    model.set_submodule(path, other)
    layer = wrap_module(model, path, made)
    assert layer is not made and layer.base_layer is other, "made for what is not there any more"


def test_features_of_conv1d_and_embedding() -> None:
    model = FAMILIES["gpt2"]()
    attention = wrap_module(model, "transformer.h.0.attn.c_attn")
    assert isinstance(attention, SelectiveLinear) and attention.fan_in_fan_out
    assert (attention.in_features, attention.out_features) == (32, 96)
    tokens = wrap_module(model, "transformer.wte")
    assert isinstance(tokens, SelectiveEmbedding)
    assert (tokens.in_features, tokens.out_features) == (96, 32)
    with pytest.raises(TypeError, match=r"transformer\.ln_f is a LayerNorm"):
        wrap_module(model, "transformer.ln_f")


def test_position_embedding_that_takes_a_mask_cannot_be_wrapped() -> None:
    assert not can_wrap(FAMILIES["opt"]().model.decoder.embed_positions)


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "qwen2"])
def test_stock_model_with_pooled_adapters_equals_peft(family: str, adapters: dict[str, dict[str, Path]]) -> None:
    """As the engine uses it: no PEFT adapters in the model, weights in a pool, all rows in one pass."""
    peft_model = oracle.load(family, adapters[family])
    ids = oracle.inputs(padded=False)["input_ids"]
    expected = [
        oracle.alone(peft_model, name, lambda row=row: peft_model(ids[row : row + 1]).logits)
        for row, name in enumerate(oracle.NAMES)
    ]
    model = FAMILIES[family]()
    targets = set(target_modules(family))
    paths = [n for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in targets and can_wrap(m)]
    pool, slots = LoRAPool("cpu", torch.float32), {"wide": 0, "narrow": 1, "late": 2, "__base__": -1}
    layers = {path: wrap_module(model, path) for path in paths}
    for layer in layers.values():
        is_embedding = isinstance(layer, SelectiveEmbedding)
        layer.lora_index = pool.add_layer(layer.in_features, layer.out_features, embedding=is_embedding)
    for name in ("wide", "narrow", "late"):
        pool.load(slots[name], _weights(peft_model, layers, name))
    plan = LoRAPlan.from_rows(np.repeat([slots[name] for name in oracle.NAMES], ids.shape[1]))
    with torch.no_grad(), ForwardContext(lora=plan, lora_logits=plan, lora_weights=pool.weights):
        oracle.assert_logits_close(model(ids).logits, torch.cat(expected))


def _weights(model: PeftModel, layers: dict[str, SelectiveLinear | SelectiveEmbedding], name: str) -> dict:
    found = {}
    for path, layer in layers.items():
        module = model.get_base_model().get_submodule(path)
        if name in getattr(module, "lora_embedding_A", ()):
            A, B = module.lora_embedding_A[name], module.lora_embedding_B[name]
        elif name in getattr(module, "lora_A", ()):
            A, B = module.lora_A[name].weight, module.lora_B[name].weight
        else:
            continue
        found[layer.lora_index] = (A.detach(), B.detach(), module.scaling[name])
    return found


def test_swapping_is_for_exact_classes(llama: PeftModel) -> None:
    layer = next(m for m in llama.modules() if type(m) is LoraLinear)
    attributes = dict(vars(layer))
    assert swap_class(layer) and type(layer) is SelectiveLinear and not swap_class(layer)
    layer.lora_index = 5
    assert restore_class(layer) and type(layer) is LoraLinear and not restore_class(layer)
    assert vars(layer) == attributes
    assert not swap_class(torch.nn.Linear(2, 2))


def test_rows_that_do_not_match_the_batch_are_refused() -> None:
    layer = SelectiveLinear.wrap(torch.nn.Linear(3, 2))
    pool = LoRAPool("cpu", torch.float32)
    layer.lora_index = pool.add_layer(3, 2)
    pool.load(0, {0: (torch.ones(1, 3), torch.ones(2, 1), 1.0)})
    plan = LoRAPlan.from_rows(np.zeros(4, np.int32))
    with ForwardContext(lora=plan, lora_weights=pool.weights), pytest.raises(RuntimeError, match=r"got 5 rows.*has 4"):
        layer(torch.zeros(5, 3))
