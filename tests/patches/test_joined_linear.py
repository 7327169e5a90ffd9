"""Weights in one buffer: the answers, the Parameters and the files of a model stay what they were."""

from __future__ import annotations

import copy
import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from peft_dist.forward_context import ForwardContext
from peft_dist.patches.joined_linear import JoinedLinear, join_linears, joint_of, part_linear
from peft_dist.patches.joining import join_weights, part_weights
from peft_dist.patches.together import call_together
from tests.patches.merge_cases import digest
from tests.tiny_models import FAMILIES

DTYPES = (torch.float32, torch.bfloat16)


def layers(dtype: torch.dtype = torch.float32, bias: tuple[bool, ...] = (False,) * 3) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(24, size, bias=b).to(dtype) for size, b in zip((32, 8, 8), bias, strict=True)]


def storages(model: nn.Module) -> dict[int, int]:
    """Bytes by address of all that parameters keep in memory."""
    found = (p.untyped_storage() for p in model.parameters())
    return {storage.data_ptr(): storage.nbytes() for storage in found}


@pytest.mark.parametrize("bias", [(False,) * 3, (True,) * 3, (True, False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_multiplication_gives_what_three_give(dtype: torch.dtype, bias: tuple[bool, ...]) -> None:
    group = layers(dtype, bias)
    x = torch.randn(5, 24).to(dtype)
    before = [p for layer in group for p in layer.parameters()]
    values = [p.clone() for p in before]
    with torch.no_grad():
        expected = [layer(x) for layer in group]
        assert join_linears(group)
        outside = [layer(x) for layer in group]
        with ForwardContext() as context:
            together = call_together(group, x)
            one_by_one = [layer(x) for layer in group]
            assert not context.shared
    assert all(a is b for a, b in zip(before, (p for layer in group for p in layer.parameters()), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))
    for outputs in (outside, together, one_by_one):
        for ours, theirs in zip(outputs, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    for outputs in (together, one_by_one):
        assert len({output.untyped_storage().data_ptr() for output in outputs}) == 1, "columns of one tensor"


def test_parting_brings_everything_back() -> None:
    group = layers(bias=(True,) * 3)
    before = [(type(layer), dict(layer.__dict__), list(layer.parameters())) for layer in group]
    values = [p.clone() for _, _, parameters in before for p in parameters]
    join_linears(group)
    part_linear(group[1])
    for layer, (kind, attributes, parameters) in zip(group, before, strict=True):
        assert type(layer) is kind and layer.__dict__ == attributes
        assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in parameters)
    assert all(torch.equal(a, b) for a, b in zip(values, (p for _, _, ps in before for p in ps), strict=True))


def test_what_cannot_be_joined_is_left_alone() -> None:
    class Own(nn.Linear):
        pass

    plain, half = nn.Linear(4, 4), nn.Linear(4, 4).bfloat16()
    hooked = nn.Linear(4, 4)
    hooked.forward = lambda x: x
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    for other in (half, hooked, quantised, Own(4, 4), nn.Linear(5, 4), nn.Linear(4, 4, device="meta")):
        kind, weight = type(other), other.weight.data_ptr()
        assert not join_linears([plain, other])
        assert type(plain) is nn.Linear and type(other) is kind and other.weight.data_ptr() == weight
    assert not join_linears([plain])


def test_changed_replaced_and_moved_weights_are_seen() -> None:
    group = layers(bias=(True,) * 3)
    plain = copy.deepcopy(group)
    join_linears(group)
    joint = joint_of(group[0])

    def check(intact: bool) -> None:
        x = torch.randn(3, 24, dtype=group[0].weight.dtype)
        with torch.no_grad(), ForwardContext():
            outputs = [layer(x) for layer in group]
            assert joint.is_intact == intact
            for ours, layer in zip(outputs, plain, strict=True):
                torch.testing.assert_close(ours, layer(x))

    with torch.no_grad():
        for model in (group, plain):
            model[0].weight.mul_(2)
            model[1].bias.data += 1
            model[2].load_state_dict({"weight": torch.full((8, 24), 0.5), "bias": torch.zeros(8)})
    check(intact=True)
    assert join_linears(copy.deepcopy(group)), "a copy is joined on its own"
    for model in (group, plain):
        model[1].weight = nn.Parameter(torch.full((8, 24), 0.25))
    check(intact=False)
    for model in (group, plain):
        model[1].weight.data = model[1].weight.data * 3
    check(intact=False)
    for model in (group, plain):
        for layer in model:
            layer.double().bfloat16().float()
    check(intact=True)
    group[0].to("meta")
    assert not joint.is_intact


def test_gradients_and_optimiser_steps() -> None:
    group, plain = layers(bias=(True,) * 3), layers(bias=(True,) * 3)
    join_linears(group)
    x = torch.randn(7, 24)
    for model in (group, plain):
        optimiser = torch.optim.AdamW([p for layer in model for p in layer.parameters()], lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            torch.cat([layer(x) for layer in model], dim=-1).square().sum().backward()
            optimiser.step()
    for ours, theirs in zip(group, plain, strict=True):
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias.grad, theirs.bias.grad)
    assert joint_of(group[0]).is_intact
    with ForwardContext():
        torch.cat([layer(x) for layer in group], dim=-1).sum().backward()


def test_copies_and_pickles_stand_alone() -> None:
    group = layers()
    join_linears(group)
    x = torch.randn(2, 24)
    for copied in (copy.deepcopy(group), pickle.loads(pickle.dumps(group))):
        with torch.no_grad(), ForwardContext():
            assert all(torch.equal(a(x), b(x)) for a, b in zip(copied, layers(), strict=True))
            copied[0].weight.zero_()
        assert group[0].weight.any()
        assert type(copied[0]) is nn.Linear and set(copied[0].__dict__) == set(nn.Linear(1, 1).__dict__)


def files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_the_same_joined_and_parted(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    keys, parameters, before = list(model.state_dict()), list(model.parameters()), digest(model)
    kinds, size = [type(m) for m in model.modules()], sum(storages(model).values())
    model.save_pretrained(tmp_path / "before")
    expected = {"gpt2": 0, "phi3": 0, "gpt_neox": 0, "opt": 3, "gpt_oss": 3, "mixtral": 3}.get(family, 6)
    assert join_weights(model) == expected and join_weights(model) == 0
    assert sum(storages(model).values()) <= 1.01 * size
    assert list(model.state_dict()) == keys and digest(model) == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model.save_pretrained(tmp_path / "joined")
    assert files(tmp_path / "joined") == files(tmp_path / "before")
    part_weights(model)
    assert digest(model) == before and [type(m) for m in model.modules()] == kinds
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert sum(storages(model).values()) == size


def test_saved_and_loaded_by_torch(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    before = digest(model)
    join_weights(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 1.2 * sum(storages(model).values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert digest(model) == before and joint_of(model.model.layers[0].mlp.up_proj).is_intact
    model.save_pretrained(tmp_path)
    assert digest(AutoModelForCausalLM.from_pretrained(tmp_path)) == before


def test_a_shared_parameter_is_not_moved() -> None:
    model: PreTrainedModel = FAMILIES["llama"]()
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    second.k_proj.weight = first.k_proj.weight
    assert join_weights(model) == 4
    assert type(first.q_proj) is type(second.q_proj) is nn.Linear
    assert first.k_proj.weight is second.k_proj.weight


def test_an_error_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    before, size = [type(m) for m in model.modules()], storages(model)
    real, calls = torch.empty, []

    def fail(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no more")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(torch.OutOfMemoryError):
        join_weights(model)
    assert [type(m) for m in model.modules()] == before
    assert sorted(storages(model).values()) == sorted(size.values())


def test_below_peft_layers_merging_and_training_go_on() -> None:
    model = FAMILIES["llama"]()
    config = LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], r=4, init_lora_weights=False)
    peft_model = get_peft_model(model, config).eval()
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        expected = peft_model(ids).logits
        assert join_weights(peft_model) == 6
        assert type(peft_model.get_base_model().model.layers[0].self_attn.k_proj) is JoinedLinear
        torch.testing.assert_close(peft_model(ids).logits, expected)
        peft_model.merge_adapter()
        torch.testing.assert_close(peft_model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        peft_model.unmerge_adapter()
    peft_model.train()
    peft_model(ids).logits.sum().backward()
    assert all(p.grad is not None for n, p in peft_model.named_parameters() if "lora_" in n)
