"""What the runner keeps of merging: the way, the budget, the adapter, and the plans of the others' rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_dist.forward_context import ForwardContext
from peft_dist.kernels import merge as merge_kernels
from peft_dist.runner.adapter_tensors import ModuleWeights
from peft_dist.runner.merge_state import MergeState, MergeWay, plans_for
from tests.patches.merge_cases import digest, random_tensors, wrap_all
from tests.tiny_models import FAMILIES

IDS = torch.arange(3, 15)[None]
Weights = dict[str, ModuleWeights]


@pytest.fixture
def model() -> torch.nn.Module:
    return FAMILIES["llama"]()


@pytest.fixture
def adapters(model: torch.nn.Module) -> list[Weights]:
    layers, _ = wrap_all(model, ("q_proj", "v_proj", "down_proj"))
    return [{path: ModuleWeights(*t) for path, t in random_tensors(layers, 4, seed).items()} for seed in range(2)]


def logits(model: torch.nn.Module, state: MergeState) -> torch.Tensor:
    with torch.no_grad(), ForwardContext(merged=state.layers_for_context()):
        return model(IDS).logits.clone()


@pytest.mark.parametrize("way", ["shadow", "host"])
def test_switching(way: MergeWay, model: torch.nn.Module, adapters: list[Weights]) -> None:
    before = digest(model)
    state = MergeState(model, way, paths=adapters[0])
    assert (state.way, state.current, state.cannot) == (way, None, {})
    assert state.num_bytes == state.device_bytes == sum(_bytes(model, path) for path in adapters[0])
    state.allocate()
    answers = [logits(model, state)]
    for number, adapter in enumerate(adapters):
        state.switch(f"hash{number}", adapter)
        assert state.current == f"hash{number}"
        answers.append(logits(model, state))
    assert not torch.equal(answers[1], answers[2])
    state.switch("hash1", {})
    state.switch("hash0", adapters[0])
    assert torch.equal(logits(model, state), answers[1])
    state.switch(None)
    assert state.current is None and digest(model) == before
    assert torch.equal(logits(model, state), answers[0])


def test_an_adapter_that_the_shadow_still_holds_comes_back_for_nothing(
    model: torch.nn.Module, adapters: list[Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = MergeState(model, "shadow")
    state.switch("a", adapters[0])
    merged = logits(model, state)
    state.switch(None)
    with monkeypatch.context() as patched:
        patched.setattr(merge_kernels, "_merge", _fail)
        state.switch("a", adapters[0])
    assert torch.equal(logits(model, state), merged)


def _fail(*_: object) -> None:
    raise MemoryError("no more memory")


@pytest.mark.parametrize("way", ["shadow", "host"])
def test_a_switch_that_fails_leaves_the_base(
    way: MergeWay, model: torch.nn.Module, adapters: list[Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digest(model)
    state = MergeState(model, way)
    base = logits(model, state)
    state.switch("a", adapters[0])
    merged = logits(model, state)
    for weights in ({}, None, {"model.norm": adapters[0]["model.layers.0.self_attn.q_proj"]}):
        with pytest.raises(ValueError, match="adapter b: "):
            state.switch("b", weights)
        assert state.current == "a" and torch.equal(logits(model, state), merged)
    with monkeypatch.context() as patched:
        patched.setattr(merge_kernels, "_merge", _fail)
        with pytest.raises(MemoryError):
            state.switch("b", adapters[1])
    assert state.current is None and digest(model) == before
    assert torch.equal(logits(model, state), base)
    state.switch("a", adapters[0])
    assert torch.equal(logits(model, state), merged)


def test_the_way_goes_by_the_budget(model: torch.nn.Module, adapters: list[Weights]) -> None:
    paths = list(adapters[0])
    needed = MergeState(model, "shadow", paths=paths).num_bytes
    assert MergeState(model, "auto", needed, paths).way == "shadow"
    assert MergeState(model, "auto", None, paths).way == "shadow"
    small = MergeState(model, "auto", needed - 1, paths)
    assert small.way == "host" and small.mergeable(paths) is None
    assert MergeState(model, "shadow", 0, paths).mergeable(paths) is None


def test_layers_that_come_later_count_too(model: torch.nn.Module, adapters: list[Weights]) -> None:
    wrap_all(model, ("k_proj",))
    paths = list(adapters[0])
    budget = MergeState(model, "shadow", paths=paths).num_bytes
    state = MergeState(model, "auto", budget, paths)
    more = [*paths, "model.layers.0.self_attn.k_proj"]
    assert state.mergeable(paths) is None
    assert f"{budget} are given" in str(state.mergeable(more))
    assert "no layer of the model" in str(state.mergeable(["model.norm"]))
    weights = adapters[0] | {more[-1]: ModuleWeights(torch.ones(1, 32), torch.ones(16, 1), 1.0)}
    with pytest.raises(ValueError, match="adapter big: its merged weights would need"):
        state.switch("big", weights)


def _bytes(model: torch.nn.Module, path: str) -> int:
    weight: torch.Tensor = model.get_submodule(path).base_layer.weight
    return weight.nbytes


@given(st.lists(st.integers(-1, 4), max_size=12), st.integers(-1, 4))
def test_plans_say_what_each_row_gets(slots: list[int], merged: int) -> None:
    """Its own adapter unless that is merged; and less the merged one unless it is its own."""
    lora, correction = plans_for(np.array(slots, int), merged if merged >= 0 else None, "torch")
    got = np.zeros((len(slots), 5))
    for plan in (lora, correction):
        if plan is None:
            continue
        assert plan.num_rows == len(slots) and plan.backend == "torch"
        for slot, first, end in zip(plan.slots, plan.starts, plan.starts[1:], strict=False):
            if slot >= 0:
                got[first:end, slot] += plan.factor
    expected = np.zeros((len(slots), 5))
    for row, slot in enumerate(slots):
        if merged >= 0:
            expected[row, merged] -= 1
        if slot >= 0:
            expected[row, slot] += 1
    assert np.array_equal(got, expected)
    assert (correction is None) == (merged < 0 or all(slot == merged for slot in slots))


def test_plans_where_nothing_is_merged() -> None:
    for make in (lambda s: plans_for(s, None), lambda s: plans_for(s, -1)):
        lora, correction = _both(make, np.array([1, 1, -1]))
        assert correction is None and lora is not None and lora.slots.tolist() == [1, -1] and lora.factor == 1.0
        assert _both(make, np.array([-1])) == (None, None)


def _both(make: Callable[[np.ndarray], tuple[object, object]], slots: np.ndarray) -> tuple:
    return make(slots)
