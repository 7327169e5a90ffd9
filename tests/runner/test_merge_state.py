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
    assert state.num_bytes == sum(_bytes(model, path) for path in adapters[0]) and state.on_device
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


def test_the_way_goes_by_the_room(model: torch.nn.Module, adapters: list[Weights]) -> None:
    """Half of the room has to be left for KV blocks."""
    paths = list(adapters[0])
    needed = MergeState(model, "shadow", paths=paths).num_bytes
    assert MergeState(model, "auto", lambda _: 2 * needed, paths).way == "shadow"
    assert MergeState(model, "auto", lambda _: None, paths).way == "shadow"
    assert MergeState(model, "auto", lambda _: 2 * needed - 1, paths).way == "host"
    assert MergeState(model, "shadow", lambda _: 0, paths).way == "shadow"


@pytest.mark.parametrize("way", ["shadow", "host"])
def test_layers_that_come_later_count_too(way: MergeWay, model: torch.nn.Module, adapters: list[Weights]) -> None:
    wrap_all(model, ("k_proj",))
    room = 0
    paths = list(adapters[0])
    late = "model.layers.0.self_attn.k_proj"
    state = MergeState(model, way, lambda _: room, paths)
    before = state.num_bytes
    state.allocate()
    needed = _bytes(model, late)
    assert state.more_bytes([*paths, late, "model.norm"]) == needed
    assert state.reserve(paths) is None
    assert f"need {needed} bytes more, 0 are left" in str(state.reserve([*paths, late]))
    assert "no layer of the model" in str(state.reserve(["model.norm"]))
    weights = adapters[0] | {late: ModuleWeights(torch.ones(1, 32), torch.ones(16, 1), 1.0)}
    with pytest.raises(ValueError, match="adapter big: second copies of its layers would need"):
        state.switch("big", weights)
    assert state.num_bytes == before
    room = needed
    assert state.reserve([*paths, late]) is None
    room = 0
    # What was promised is kept.
    assert state.reserve([*paths, late]) is None and state.num_bytes == before + needed
    state.switch("big", weights)
    assert state.current == "big"


@pytest.mark.parametrize("way", ["shadow", "host"])
def test_no_merge_allocates_what_was_reserved(
    way: MergeWay, model: torch.nn.Module, adapters: list[Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = MergeState(model, way, paths=list(adapters[0])[:2])
    state.allocate()
    assert state.reserve(adapters[0].keys()) is None
    monkeypatch.setattr(torch, "empty_like", _fail)
    for number, adapter in enumerate(adapters):
        state.switch(f"hash{number}", adapter)
    state.switch(None)


def test_layers_for_which_memory_runs_out_are_as_unknown_as_before(
    model: torch.nn.Module, adapters: list[Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = MergeState(model, "shadow")
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty_like", _fail)
        assert "no more memory" in str(state.reserve(adapters[0].keys()))
    assert state.num_bytes == 0
    assert state.reserve(adapters[0].keys()) is None and state.num_bytes > 0


def test_what_the_shadow_holds_is_told(model: torch.nn.Module, adapters: list[Weights]) -> None:
    state = MergeState(model, "shadow")
    state.switch("a", adapters[0])
    state.switch(None)
    assert state.holds("a") and not state.holds("b") and state.holds(None)
    state.switch("b", adapters[1])
    assert state.holds("b") and not state.holds("a")
    state.discard("b")
    assert state.holds("b"), "the weights hold it now"
    state.switch(None)
    state.discard("b")
    assert not state.holds("b")
    in_place = MergeState(FAMILIES["llama"](), "host")
    wrap_all(in_place._merger._model, ("q_proj", "v_proj", "down_proj"))  # type: ignore[arg-type]
    in_place.switch("a", adapters[0])
    in_place.switch(None)
    assert not in_place.holds("a") and not in_place.holds(None)


def test_the_base_is_read_as_it_is_while_something_is_merged_in_place(
    model: torch.nn.Module, adapters: list[Weights]
) -> None:
    path = next(iter(adapters[0]))
    weight: torch.Tensor = model.get_submodule(path).base_layer.weight
    original = weight.detach().clone()
    state = MergeState(model, "host", paths=[path])
    assert torch.equal(state.base_weight(path), original)
    state.switch("a", adapters[0])
    assert not torch.equal(weight, original) and torch.equal(state.base_weight(path), original)


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
