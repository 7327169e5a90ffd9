"""Tensors that do not fit base and configuration are refused, with the tensor or module named."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_dist.core.errors import AdapterError, UnfitAdapterError
from peft_dist.runner.adapter_modules import describe_modules
from peft_dist.runner.adapter_tensors import inspect_adapter, load_adapter
from peft_dist.runner.adapter_weights import in_one_buffer
from tests.runner.adapter_folder import (
    KEY,
    MODEL,
    WEIGHTS,
    Q,
    Tensors,
    edit,
    folder,
    load,
    refused,
    set_config,
)

__all__ = ["folder"]


def test_wrong_base_shape(folder):
    edit(folder, lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 99)}))
    refused(folder, Q, "[4, 99]", "32 inputs", "trained on")


def test_what_is_whole_and_does_not_fit_is_told_from_what_is_damaged(folder):
    edit(folder, lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 99)}))
    for look in (load_adapter, inspect_adapter):
        with pytest.raises(UnfitAdapterError, match="32 inputs"):
            look("a", folder, describe_modules(MODEL))
        whole = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(whole[:-1])
        with pytest.raises(AdapterError) as damaged:
            look("a", folder, describe_modules(MODEL))
        assert not isinstance(damaged.value, UnfitAdapterError)
        (folder / WEIGHTS).write_bytes(whole)


def test_wrong_output_shape(folder):
    edit(folder, lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(99, 4)}))
    refused(folder, Q, "[99, 4]", "32 outputs")


def test_wrong_number_of_dimensions(folder):
    edit(folder, lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(128)}))
    refused(folder, Q, "[128]")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.lora_B.weight",
        "base_model.model.model.embed_tokens.lora_A.weight",
        f"{KEY}.lora_embedding_A",
        f"{KEY}.lora_A",
        f"{KEY}.lora_C.weight",
        "anything",
    ],
)
def test_tensors_that_land_nowhere(folder, name):
    set_config(folder, base_model_name_or_path="org/other-base")
    edit(folder, lambda t: t.update({name: torch.ones(4, 32)}))
    refused(folder, name, "land nowhere", "org/other-base")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"{KEY}.lora_magnitude_vector.weight", "DoRA"),
        (f"{KEY}.lora_B.bias", "biases"),
        (f"{KEY}.base_layer.bias", "biases"),
        (f"{KEY}.lora_diag", "KaSA"),
        ("base_model.model.lm_head.modules_to_save.weight", "whole modules"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "token embeddings"),
    ],
)
def test_foreign_tensors_are_named(folder, name, kind):
    edit(folder, lambda t: t.update({name: torch.ones(4)}))
    refused(folder, name, kind)


def test_config_does_not_name_the_module(folder):
    set_config(folder, target_modules=["v_proj"])
    refused(folder, "q_proj", "does not name")


def test_config_excludes_the_module(folder):
    set_config(folder, exclude_modules=["q_proj"])
    refused(folder, "q_proj", "does not name")


def test_config_leaves_out_the_layer(folder):
    set_config(folder, layers_to_transform=[1, 2])
    refused(folder, Q, "does not name", "layers_to_transform")


def test_named_modules_without_tensors_are_logged(folder, caplog):
    set_config(folder, target_modules=["q_proj", "v_proj", "k_proj"])
    assert not any("k_proj" in path for path in load(folder).weights)
    assert "model.layers.0.self_attn.k_proj" in caplog.text


@pytest.mark.parametrize("side", ["A", "B"])
def test_missing_partner(folder, side):
    edit(folder, lambda t: t.pop(f"{KEY}.lora_{side}.weight"))
    refused(folder, Q, f"lora_{side}")


def test_no_tensors(folder):
    save_file({}, folder / WEIGHTS)
    refused(folder, "no LoRA tensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixed", [False, True])
def test_not_finite(folder, value, dtype, mixed):
    name = f"{KEY}.lora_B.weight"

    def spoil(tensors: Tensors) -> None:
        for key in tensors:
            tensors[key] = tensors[key].to(dtype) if key == name or not mixed else tensors[key].float()
        tensors[name][17, 2] = value

    edit(folder, spoil)
    refused(folder, name, "NaN or an infinity")


def test_rank_zero(folder):
    empty = {f"{KEY}.lora_A.weight": torch.ones(0, 32), f"{KEY}.lora_B.weight": torch.ones(32, 0)}
    edit(folder, lambda t: t.update(empty))
    refused(folder, Q, "rank 0")


def test_rank_against_config(folder):
    set_config(folder, r=8)
    refused(folder, "q_proj", "rank 4", "says 8")


def test_rank_against_rank_pattern(folder):
    set_config(folder, rank_pattern={"layers.0.self_attn.q_proj": 2})
    refused(folder, Q, "rank 4", "says 2", "rank_pattern")


def test_rank_of_a_against_b(folder):
    edit(folder, lambda t: t.update({f"{KEY}.lora_B.weight": torch.ones(32, 3)}))
    refused(folder, Q, "rank 4 in lora_A and 3 in lora_B")


def test_resized_vocabulary(folder):
    edit(folder, lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(100, 32)}))
    refused(folder, "embed_tokens.weight", "[100, 32]", "[96, 32]", "resized vocabulary")


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.embed_tokens.base_layer", "lm_head"])
def test_copies_of_base_weights(folder, name):
    key = f"base_model.model.{name}.weight"
    own = MODEL.get_submodule(name.removesuffix(".base_layer")).weight.detach().clone()
    plain = load(folder)
    edit(folder, lambda t: t.update({key: own}))
    copied = load(folder)
    assert copied.spec.content_hash == plain.spec.content_hash and copied.spec.num_bytes == plain.spec.num_bytes
    edit(folder, lambda t: t.update({key: own.bfloat16()}))
    assert load(folder).spec.content_hash == plain.spec.content_hash
    own[3, 3] += 0.5
    edit(folder, lambda t: t.update({key: own}))
    refused(folder, key, "differs from this base's")


def test_a_base_weight_that_is_merged_into_while_it_is_read_is_read_again(folder):
    own = MODEL.lm_head.weight.detach().clone()
    edit(folder, lambda t: t.update({"base_model.model.lm_head.weight": own}))
    for second, refusal in ((own, False), (own + 2, True)):
        reads = iter([own + 1, second])
        modules = describe_modules(MODEL)
        modules["lm_head"] = replace(modules["lm_head"], weight=lambda reads=reads: next(reads))
        with pytest.raises(AdapterError, match="differs") if refusal else nullcontext():
            load_adapter("x", folder, modules)


def test_copies_do_not_keep_their_memory(folder):
    edit(folder, lambda t: t.update({"base_model.model.lm_head.weight": MODEL.lm_head.weight.detach().clone()}))
    weights = load(folder).weights[Q]
    assert weights.A.untyped_storage().nbytes() == weights.A.nbytes


def test_tensors_of_any_size_and_type_share_one_buffer():
    own = {
        "a": torch.randn(3, 1).half(),
        "b": torch.randn(2, 3),
        "c": torch.randn(0, 4),
        "d": torch.randn(5).bfloat16(),
    }
    packed = in_one_buffer(own, pin_memory=False)
    assert all(torch.equal(packed[name], tensor) and packed[name].dtype == tensor.dtype for name, tensor in own.items())
    assert {tensor.untyped_storage().nbytes() for tensor in packed.values()} == {8 + 24 + 16}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64, torch.int32])
def test_unsupported_types(folder, dtype):
    name = f"{KEY}.lora_A.weight"
    edit(folder, lambda t: t.update({name: torch.ones(4, 32).to(dtype)}))
    refused(folder, name, "float32, bfloat16 or float16")


# Keys of older PEFT.


def test_keys_with_the_adapters_name(folder):
    plain = load(folder)

    def rename(tensors: Tensors) -> None:
        for key in list(tensors):
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    edit(folder, rename)
    assert load(folder).spec.content_hash == plain.spec.content_hash


def test_keys_of_two_adapters(folder):
    tensors = load_file(folder / WEIGHTS)
    named = {key.replace("weight", f"{'a' if Q in key else 'b'}.weight"): tensor for key, tensor in tensors.items()}
    save_file(named, folder / WEIGHTS)
    refused(folder, "mixes adapters")
