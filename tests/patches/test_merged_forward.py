"""Passes over merged weights, with and without corrections, answer each row as PEFT does with its adapter alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from peft_dist.kernels.lora_pool import LayerTensors
from peft_dist.patches.joined_linear import JoinedLinear, joint_of
from peft_dist.patches.joining import join_weights
from peft_dist.patches.lora_layers import SelectiveLayer
from peft_dist.patches.lora_wrapping import wrap_module
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


LAYOUTS = {"plain": lambda model: None, "packed": lambda model: pack_weights(model, True), "joined": join_weights}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3", "opt", "qwen2", "phi3"])
def test_every_row_equals_peft(family: str, way: str, layout: str, adapters: dict[str, dict[str, Path]]) -> None:
    """ "wide" adapts embeddings and the head as well, which most of these families tie."""
    peft_model = oracle.load(family, adapters[family])
    ids = oracle.inputs(padded=False)["input_ids"]
    expected = {
        name: oracle.alone(peft_model, name, lambda: peft_model(ids).logits)
        for name in ("wide", "narrow", "late", "__base__")
    }
    model = FAMILIES[family]()
    LAYOUTS[layout](model)
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
    if layout == "plain":
        assert torch.equal(run(model, pool, merger, [-1] * len(ids), None, ids), FAMILIES[family]()(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["packed", "joined"])
@pytest.mark.parametrize("way", WAYS)
def test_half_precision_stays_near_float32(way: str, layout: str, dtype: torch.dtype) -> None:
    ids = oracle.inputs(padded=False)["input_ids"]
    answers = []
    for kind in (torch.float32, dtype):
        model = FAMILIES["llama"]().to(kind)
        LAYOUTS[layout](model)
        layers, pool = wrap_all(model, ("q_proj", "k_proj", "v_proj", "down_proj"))
        merger = WAYS[way](model, layers)
        for slot in range(3):
            tensors = random_tensors(layers, 4, slot)
            pool.load(slot, {layers[path].lora_index: t for path, t in tensors.items()})
        merger.merge(random_tensors(layers, 4, 0))
        answers.append(run(model, pool, merger, MIXED, 0, ids).float())
    error = (answers[1] - answers[0]).abs().max() / answers[0].abs().max()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("layout", ["packed", "joined"])
def test_layers_that_lie_together_of_which_only_some_are_adapted(layout: str) -> None:
    """Of q/k/v, k has no LoRA layer around it, and is computed with the others all the same."""
    ids = oracle.inputs(padded=False)["input_ids"]
    answers = []
    for name in ("plain", layout):
        model = FAMILIES["llama"]()
        LAYOUTS[name](model)
        layers, pool = wrap_all(model, ("q_proj", "v_proj"))
        merger = ShadowMerger(model)
        for adapter, slots in ((0, layers), (1, [path for path in layers if "q_proj" in path])):
            tensors = random_tensors(layers, 4, adapter)
            merger.merge({path: tensors[path] for path in slots})
            answers.append(run(model, pool, merger, [0] * len(ids), 0, ids))
    oracle.assert_logits_close(answers[2], answers[0])
    oracle.assert_logits_close(answers[3], answers[1])
    k_proj = model.model.layers[0].self_attn.k_proj
    assert type(k_proj) in (PackedLinear, JoinedLinear, torch.nn.Linear)


def test_the_merged_weights_of_joined_layers_are_one_buffer_that_stays() -> None:
    model = FAMILIES["llama"]()
    join_weights(model)
    layers, _ = wrap_all(model, ("q_proj", "k_proj", "v_proj", "down_proj"))
    merger = ShadowMerger(model, [path for path in layers if "k_proj" not in path])
    joints = {joint for module in model.modules() if (joint := joint_of(module)) and len(joint.layers) == 3}
    down = sum(layer.base_layer.weight.nbytes for path, layer in layers.items() if "down" in path)
    expected = down + sum(joint.weight.nbytes for joint in joints)
    assert merger.num_bytes == expected, "k is copied with its siblings"
    merger.merge({path: t for path, t in random_tensors(layers, 4, 0).items() if "q_proj" in path})
    buffers = merger.layers.joined
    assert set(buffers) == joints and not merger.layers.twins.keys() & {m for j in joints for m in j.layers}
    places = [buffer.data_ptr() for buffer in buffers.values()]
    for joint, buffer in buffers.items():
        parts = zip(buffer.split(joint.sizes), joint.weight.split(joint.sizes), strict=True)
        changed = [not torch.equal(merged, base) for merged, base in parts]
        assert changed == [True, False, False]
    copied = merger.copy_out()
    merger.merge(random_tensors(layers, 2, 1))
    merger.copy_in(copied)
    assert [buffer.data_ptr() for buffer in merger.layers.joined.values()] == places
    for joint, buffer in merger.layers.joined.items():
        assert torch.equal(buffer[joint.sizes[0] :], joint.weight[joint.sizes[0] :])
    assert merger.num_bytes == expected


def test_a_layer_that_no_pass_would_read_merged_is_refused() -> None:
    model = FAMILIES["llama"]()
    layer = wrap_module(model, "model.layers.0.mlp.up_proj")
    merger = ShadowMerger(model)
    tensors = random_tensors({"model.layers.0.mlp.up_proj": layer}, 2, 0)["model.layers.0.mlp.up_proj"]
    gate = (torch.zeros(2, 32), torch.zeros(48, 2), 1.0)
    with pytest.raises(ValueError, match=r"gate_proj has no LoRA layer"):
        merger.merge({"model.layers.0.mlp.up_proj": tensors, "model.layers.0.mlp.gate_proj": gate})
    assert not merger.is_merged
