"""Passes over merged weights, with and without corrections, answer each row as PEFT does with its adapter alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_dist.kernels.lora_pool import LayerTensors
from peft_dist.patches.lora_layers import SelectiveLayer, wrap_module
from peft_dist.patches.packed_linear import PackedLinear
from peft_dist.patches.shadow_merger import ShadowMerger
from peft_dist.runner.packing import pack_weights
from tests.patches import oracle
from tests.patches.merge_cases import WAYS, random_tensors, run, wrap_all
from tests.tiny_models import FAMILIES, target_modules

SLOTS = {"wide": 0, "narrow": 1, "late": 2, "__base__": -1}
MIXED = [SLOTS[name] for name in oracle.NAMES]


def weights_of(model: PeftModel, layers: dict[str, SelectiveLayer], name: str) -> dict[str, LayerTensors]:
    found = {}
    for path in layers:
        module = model.get_base_model().get_submodule(path)
        if name in module.lora_embedding_A:
            A, B = module.lora_embedding_A[name], module.lora_embedding_B[name]
        elif name in module.lora_A:
            A, B = module.lora_A[name].weight, module.lora_B[name].weight
        else:
            continue
        found[path] = (A.detach(), B.detach(), module.scaling[name])
    return found


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3", "opt", "qwen2", "phi3"])
def test_every_row_equals_peft(family: str, way: str, packed: bool, adapters: dict[str, dict[str, Path]]) -> None:
    """ "wide" adapts embeddings and the head as well, which most of these families tie."""
    peft_model = oracle.load(family, adapters[family])
    ids = oracle.inputs(padded=False)["input_ids"]
    expected = {
        name: oracle.alone(peft_model, name, lambda: peft_model(ids).logits)
        for name in ("wide", "narrow", "late", "__base__")
    }
    model = FAMILIES[family]()
    pack_weights(model, packed)
    layers, pool = wrap_all(model, target_modules(family))
    parts = {name: weights_of(peft_model, layers, name) for name in ("wide", "narrow", "late")}
    for name, part in parts.items():
        pool.load(SLOTS[name], {layers[path].lora_index: tensors for path, tensors in part.items()})
    merger = WAYS[way](model, layers)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    mergeable = [name for name, part in parts.items() if merger.can_merge(part)]
    assert "late" in mergeable and ("wide" in mergeable) == (way == "shadow" or not tied)
    mixed = torch.stack([expected[name][row] for row, name in enumerate(oracle.NAMES)])
    for merged in [*mergeable, *reversed(mergeable)]:
        merger.merge(parts[merged])
        oracle.assert_logits_close(
            run(model, pool, merger, [SLOTS[merged]] * len(ids), SLOTS[merged], ids), expected[merged]
        )
        oracle.assert_logits_close(run(model, pool, merger, MIXED, SLOTS[merged], ids), mixed)
        base_only = run(model, pool, merger, [-1] * len(ids), SLOTS[merged], ids)
        oracle.assert_logits_close(base_only, expected["__base__"])
    merger.unmerge()
    oracle.assert_logits_close(run(model, pool, merger, MIXED, None, ids), mixed)
    if not packed:
        assert torch.equal(run(model, pool, merger, [-1] * len(ids), None, ids), FAMILIES[family]()(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_half_precision_stays_near_float32(way: str, dtype: torch.dtype) -> None:
    ids = oracle.inputs(padded=False)["input_ids"]
    answers = []
    for kind in (torch.float32, dtype):
        model = FAMILIES["llama"]().to(kind)
        pack_weights(model, True)
        layers, pool = wrap_all(model, ("q_proj", "k_proj", "v_proj", "down_proj"))
        merger = WAYS[way](model, layers)
        for slot in range(3):
            tensors = random_tensors(layers, 4, slot)
            pool.load(slot, {layers[path].lora_index: t for path, t in tensors.items()})
        merger.merge(random_tensors(layers, 4, 0))
        answers.append(run(model, pool, merger, MIXED, 0, ids).float())
    error = (answers[1] - answers[0]).abs().max() / answers[0].abs().max()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_layers_packed_as_one_of_which_only_some_are_adapted() -> None:
    """Of q/k/v packed as one, k has no LoRA layer around it, and takes its part all the same."""
    ids = oracle.inputs(padded=False)["input_ids"]
    plain, packed = FAMILIES["llama"](), FAMILIES["llama"]()
    pack_weights(packed, True)
    answers = []
    for model in (plain, packed):
        layers, pool = wrap_all(model, ("q_proj", "v_proj"))
        merger = ShadowMerger(model)
        merger.merge(random_tensors(layers, 4, 0))
        answers.append(run(model, pool, merger, [0] * len(ids), 0, ids))
    oracle.assert_logits_close(answers[1], answers[0])
    k_proj = packed.model.layers[0].self_attn.k_proj
    assert type(k_proj) in (PackedLinear, torch.nn.Linear)


def test_a_layer_that_no_pass_would_read_merged_is_refused() -> None:
    model = FAMILIES["llama"]()
    layer = wrap_module(model, "model.layers.0.mlp.up_proj")
    merger = ShadowMerger(model)
    tensors = random_tensors({"model.layers.0.mlp.up_proj": layer}, 2, 0)["model.layers.0.mlp.up_proj"]
    gate = (torch.zeros(2, 32), torch.zeros(48, 2), 1.0)
    with pytest.raises(ValueError, match=r"gate_proj has no LoRA layer"):
        merger.merge({"model.layers.0.mlp.up_proj": tensors, "model.layers.0.mlp.gate_proj": gate})
    assert not merger.is_merged
