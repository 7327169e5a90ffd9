"""Whole merged models: which are on the device, which on the host, within what memory, and that they are right."""

from __future__ import annotations

import pytest
import torch

from peft_dist.forward_context import ForwardContext
from peft_dist.runner.adapter_tensors import ModuleWeights
from peft_dist.runner.packing import pack_weights
from peft_dist.runner.swapped_models import SwappedModels
from tests.patches.merge_cases import digest, random_tensors, wrap_all
from tests.tiny_models import FAMILIES

IDS = torch.arange(3, 15)[None]
NAMES = "abcd"
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


class Case:
    """A model, four adapters of it, and the logits of each."""

    def __init__(self, device: str = "cpu", packed: bool = False) -> None:
        self.model = FAMILIES["llama"]().to(device)
        if packed:
            pack_weights(self.model, True)
        layers, _ = wrap_all(self.model, ("q_proj", "v_proj", "down_proj"))
        self.paths = list(layers)
        self.adapters = {
            name: {path: ModuleWeights(*t) for path, t in random_tensors(layers, 4, seed).items()}
            for seed, name in enumerate(NAMES)
        }
        self.before = digest(self.model)
        self.expected: dict[str | None, torch.Tensor] = {None: self.logits(None)}
        alone = SwappedModels(self.model, self.paths, 1, 0)
        for name, weights in self.adapters.items():
            alone.switch(name, weights)
            self.expected[name] = self.logits(alone)
        self.model_bytes = alone.num_bytes
        assert alone.num_swaps == 0 and alone.host_bytes == 0

    def logits(self, state: SwappedModels | None) -> torch.Tensor:
        with torch.no_grad(), ForwardContext(merged=state.layers_for_context() if state else None):
            logits: torch.Tensor = self.model(IDS.to(self.model.device)).logits
        return logits.clone()

    def check(self, state: SwappedModels, name: str | None, *, has_copy: bool = False) -> None:
        """Switch, without the adapter's weights where a copy has to do."""
        state.switch(name, {} if has_copy or name is None else self.adapters[name])
        assert state.current == name
        assert torch.equal(self.logits(state), self.expected[name])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_models_come_and_go(device: str, packed: bool) -> None:
    case = Case(device, packed and device == "cpu")
    state = SwappedModels(case.model, case.paths, 2)
    state.allocate()
    for name in NAMES:
        case.check(state, name)
    assert [state.holds(name) for name in NAMES] == [False, False, True, True]
    case.check(state, "c", has_copy=True)
    assert state.num_swaps == 0, "it was on the device"
    case.check(state, "a", has_copy=True)
    assert state.num_swaps == 1
    assert [state.holds(name) for name in NAMES] == [True, False, True, False], "the least recently used one left"
    for name in (None, "d", "b", None, "a", "c"):
        case.check(state, name, has_copy=True)
    assert digest(case.model) == case.before
    copies = [twin.weight for weights, _ in state._host.values() for twin in weights.twins.values()]
    assert all(copy.device.type == "cpu" and copy.is_pinned() == (device == "cuda") for copy in copies)


@pytest.mark.parametrize("packed", [False, True])
def test_host_copies_keep_to_their_budget(packed: bool) -> None:
    case = Case(packed=packed)
    one = SwappedModels(case.model, case.paths, 1)
    case.check(one, "a")
    size = one.host_bytes
    assert size >= sum(weight.nbytes for weight in (case.model.get_submodule(p).base_layer.weight for p in case.paths))
    state = SwappedModels(case.model, case.paths, 1, 2 * size)
    for name in "abc":
        case.check(state, name)
        assert state.host_bytes <= 2 * size
    assert state.host_bytes == 2 * size
    case.check(state, "b", has_copy=True)
    # "c" was used before "b": it makes way for "a", which is made from its adapter again.
    case.check(state, "a")
    assert state.num_swaps == 1 and state.host_bytes == 2 * size
    case.check(state, "b", has_copy=True)
    case.check(state, "c")
    assert state.num_swaps == 2
    small = SwappedModels(case.model, case.paths, 1, size - 1)
    for name in "aba":
        case.check(small, name)
    assert small.num_swaps == 0 and small.host_bytes == 0


def test_an_adapter_that_is_gone_leaves_nothing_behind() -> None:
    case = Case()
    state = SwappedModels(case.model, case.paths, 2)
    for name in "ab":
        case.check(state, name)
    size = state.host_bytes // 2
    state.discard("a")
    assert not state.holds("a") and state.holds("b") and state.host_bytes == size
    state.discard("b")
    assert state.host_bytes == 0
    assert torch.equal(case.logits(state), case.expected["b"]), "passes see it as long as nothing else is asked for"
    # Two others fit beside one another: the places of both are free.
    case.check(state, "c")
    case.check(state, "d")
    assert [state.holds(name) for name in NAMES] == [False, False, True, True]
    with pytest.raises(ValueError, match="its weights were not given"):
        state.switch("a", {})
    assert state.current == "d" and torch.equal(case.logits(state), case.expected["d"])
    case.check(state, "a")


def test_the_model_of_an_adapter_that_is_gone_is_the_first_to_leave() -> None:
    case = Case()
    state = SwappedModels(case.model, case.paths, 2)
    for name in "ab":
        case.check(state, name)
    state.discard("b")
    case.check(state, "c")
    assert [state.holds(name) for name in "abc"] == [True, False, True]


def test_a_merge_that_fails_loses_no_place() -> None:
    case = Case()
    state = SwappedModels(case.model, case.paths, 1)
    path = case.paths[0]
    wrong = case.adapters["a"] | {path: ModuleWeights(torch.ones(1, 3), torch.ones(3, 1), 1.0)}
    for _ in range(3):
        with pytest.raises(ValueError, match="cannot take"):
            state.switch("a", wrong)
        assert state.current is None
    case.check(state, "a")


def test_memory_is_taken_at_the_start_and_for_layers_that_join() -> None:
    case = Case()
    room = 0
    state = SwappedModels(case.model, case.paths, 3, room=lambda _: room)
    assert state.num_bytes == 3 * case.model_bytes
    late = "model.layers.0.self_attn.k_proj"
    weight: torch.Tensor = case.model.get_submodule(late).weight
    assert state.more_bytes([*case.paths, late, "model.norm"]) == 3 * weight.nbytes
    assert f"need {3 * weight.nbytes} bytes more, 0 are left" in str(state.reserve([late]))
    assert "no layer of the model" in str(state.reserve(["model.norm"]))
    assert state.reserve(case.paths) is None
    room = 3 * weight.nbytes
    assert state.reserve([late]) is None
    assert state.num_bytes == 3 * (case.model_bytes + weight.nbytes)
    room = 0
    assert state.reserve([late]) is None
