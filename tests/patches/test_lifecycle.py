"""Patching and unpatching leave nothing behind, and PEFT's own operations keep working in between."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

import peft_dist
from peft_dist.patches import is_patched
from tests.patches import oracle
from tests.tiny_models import FAMILIES


def snapshot(model: PeftModel) -> dict[str, Any]:
    """Every class and every attribute object of the model and its modules."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[f"{path}:class"] = type(module)
        for name, value in vars(module).items():
            found[f"{path}:{name}"] = value
            if isinstance(value, dict):
                found |= {f"{path}:{name}:{key}": item for key, item in value.items()}
    return found


def answer(model: PeftModel, names: list[str] = oracle.NAMES) -> torch.Tensor:
    options = {"max_new_tokens": 6, "do_sample": False}
    return model.generate(**oracle.inputs(len(names)), adapter_names=names, **options)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_unpatch_restores_identical_objects(family: str, make: Callable[..., PeftModel]) -> None:
    model = make(family)
    answer(model)  # PEFT's generate leaves an attribute of its own behind.
    before = snapshot(model)
    assert peft_dist.patch(model) is model and is_patched(model)
    answer(model)
    assert snapshot(model)[":class"] is not before[":class"]
    assert peft_dist.unpatch(model) is model and not is_patched(model)
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)


def test_patch_and_unpatch_are_idempotent(llama: PeftModel) -> None:
    expected = answer(llama)
    peft_dist.unpatch(llama)
    peft_dist.patch(llama)
    kind = type(llama)
    peft_dist.patch(llama)
    assert type(llama) is kind
    assert torch.equal(answer(llama), expected)
    peft_dist.unpatch(peft_dist.unpatch(llama))
    assert torch.equal(answer(llama), expected)


def test_patch_that_fails_changes_nothing(llama: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(original: type) -> type:
        raise RuntimeError("no class today")

    before = snapshot(llama)
    monkeypatch.setattr("peft_dist.patches.peft_model.patched_class", fail)
    with pytest.raises(RuntimeError, match="no class today"):
        peft_dist.patch(llama)
    after = snapshot(llama)
    assert after.keys() == before.keys() and all(after[key] is before[key] for key in before)


def test_patch_refuses_what_is_no_peft_model() -> None:
    with pytest.raises(TypeError, match=r"PeftModel.*LlamaForCausalLM"):
        peft_dist.patch(FAMILIES["llama"]())


def test_patch_without_a_model(make: Callable[..., PeftModel], adapters: dict[str, dict[str, Path]]) -> None:
    constructor = PeftModel.__init__
    older = make()
    expected = answer(older)
    peft_dist.patch()
    try:
        peft_dist.patch()
        loaded = make()
        made = get_peft_model(FAMILIES["llama"](), LoraConfig(target_modules=["q_proj"]))
        assert is_patched(loaded) and is_patched(made) and not is_patched(older)
        assert torch.equal(answer(loaded), expected)
        kept = peft_dist.patch(older)
    finally:
        peft_dist.unpatch()
    assert PeftModel.__init__ is constructor
    assert not is_patched(loaded) and not is_patched(made) and not is_patched(make())
    assert is_patched(kept), "patched by itself, so unpatched by itself"
    peft_dist.unpatch()


def test_calls_without_names_are_pefts(make: Callable[..., PeftModel]) -> None:
    ours, theirs = peft_dist.patch(make()), make()
    for name in ("narrow", "late"):
        answers = []
        for model in (ours, theirs):
            model.set_adapter(name)
            with torch.no_grad():
                answers.append(model(**oracle.inputs()).logits)
        assert torch.equal(*answers)


def test_merged_and_disabled_adapters_give_what_peft_gives(make: Callable[..., PeftModel]) -> None:
    ours, theirs = peft_dist.patch(make()), make()
    answer(ours)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(answer(ours), answer(theirs))
    for model in (ours, theirs):
        model.set_adapter("narrow")
        model.merge_adapter()
    with torch.no_grad():
        assert torch.equal(ours(**oracle.inputs()).logits, theirs(**oracle.inputs()).logits)
    messages = []
    for model in (copy.deepcopy(ours), copy.deepcopy(theirs)):
        with pytest.raises(ValueError, match="merged adapters") as caught:
            answer(model)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    for model in (ours, theirs):
        model.unmerge_adapter()
    assert torch.equal(answer(ours), answer(theirs))


def test_adapters_come_and_go_after_patching(
    make: Callable[..., PeftModel], adapters: dict[str, dict[str, Path]]
) -> None:
    ours, theirs = peft_dist.patch(make("llama", "narrow")), make("llama", "narrow")
    answer(ours, ["narrow", "__base__"])
    for model in (ours, theirs):
        model.load_adapter(adapters["llama"]["wide"], adapter_name="wide")
        model.load_adapter(adapters["llama"]["late"], adapter_name="late")
        model.add_adapter("fresh", LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=True))
        model.eval()
    assert torch.equal(answer(ours), answer(theirs))
    assert torch.equal(answer(ours, ["fresh"]), answer(ours, ["__base__"]))
    for model in (ours, theirs):
        model.set_adapter("late")
        model.delete_adapter("narrow")
    names = ["wide", "late", "__base__"]
    assert torch.equal(answer(ours, names), answer(theirs, names))
    with pytest.raises(ValueError, match=r"narrow.*known are __base__, fresh, late, wide"):
        answer(ours)
    peft_dist.unpatch(ours)
    assert {type(m) for m in ours.modules() if isinstance(m, LoraLayer)} == {
        type(m) for m in theirs.modules() if isinstance(m, LoraLayer)
    }


def test_save_and_merge_and_unload(make: Callable[..., PeftModel], tmp_path: Path) -> None:
    ours, theirs = peft_dist.patch(make()), make()
    answer(ours)
    for folder, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / folder)
    files = [
        sorted(p.relative_to(tmp_path / f) for p in (tmp_path / f).rglob("*") if p.is_file())
        for f in ("ours", "theirs")
    ]
    assert files[0] == files[1]
    for name in files[0]:
        if name.suffix in (".safetensors", ".json"):
            assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    merged = [model.merge_and_unload() for model in (ours, theirs)]
    assert type(merged[0]) is type(merged[1])
    inputs = oracle.inputs()
    with torch.no_grad():
        assert torch.equal(merged[0](**inputs).logits, merged[1](**inputs).logits)
    assert {type(m) for m in merged[0].modules()} == {type(m) for m in merged[1].modules()}


def test_training_reaches_the_same_loss(make: Callable[..., PeftModel]) -> None:
    losses: list[list[float]] = []
    inputs = oracle.inputs(padded=False)
    for change in (lambda m: m, peft_dist.patch):
        model = change(make())
        answer(model)
        model.train()
        model.set_adapter("wide")
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses.append([])
        for _ in range(4):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses[-1].append(loss.item())
        losses[-1].append(float(answer(model.eval()).sum()))
    assert losses[0] == losses[1] and losses[0][3] < losses[0][0]


def test_several_models_do_not_disturb_each_other(make: Callable[..., PeftModel]) -> None:
    families = ["llama", "gpt2", "llama"]
    plain = [make(family) for family in families]
    patched = [peft_dist.patch(make(family)) for family in families]
    with torch.no_grad():
        for model in (plain[2], patched[2]):
            for parameter in model.parameters():
                parameter.mul_(0.9)
    expected = [answer(model) for model in plain]
    for _ in range(2):
        for model, wanted in zip(patched, expected, strict=True):
            assert torch.equal(answer(model), wanted)


def test_threads_take_turns(llama: PeftModel) -> None:
    mixes = [oracle.NAMES, oracle.NAMES[::-1], ["__base__"] * 5, ["late"] * 5]
    expected = [answer(llama, names) for names in mixes]
    peft_dist.patch(llama)
    found: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: answer(llama, mixes[i])})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(4))


def test_copies_and_pickles_work_by_themselves(llama: PeftModel) -> None:
    expected = answer(peft_dist.patch(llama))
    twin = copy.deepcopy(llama)
    buffer = io.BytesIO()
    torch.save(llama, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.zero_()
    for model in (twin, loaded):
        assert is_patched(model) and torch.equal(answer(model), expected)
        assert not is_patched(peft_dist.unpatch(model))
        assert torch.equal(answer(model), expected)


def test_nothing_keeps_a_patched_model_alive(make: Callable[..., PeftModel]) -> None:
    model = peft_dist.patch(make())
    answer(model)
    gone = weakref.ref(model.get_base_model())
    del model
    gc.collect()
    assert gone() is None
