"""Merging where the adapter lies: what layer by layer gives, without a copy, and with the same promises."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

import pytest
import torch
from transformers import PreTrainedModel

from peft_dist.kernels.lora_pool import LayerTensors, LoRAPool
from peft_dist.kernels.pooled_adapter import PooledAdapter
from peft_dist.patches import pooled_merge
from peft_dist.patches.joining import join_weights
from peft_dist.patches.merging import weight_of
from peft_dist.patches.packed_linear import packing_of
from peft_dist.patches.shadow_merger import ShadowMerger
from peft_dist.runner.adapter_tensors import ModuleWeights
from peft_dist.runner.merge_state import MergeState
from peft_dist.runner.packing import pack_weights
from peft_dist.runner.pooled_weights import PooledWeights
from tests import triton_interpreter
from tests.kernels.lora_cases import DEVICES, HAS_GPU
from tests.patches.merge_cases import digest, random_tensors, run, wrap_all
from tests.thorough import some_of
from tests.tiny_models import FAMILIES, target_modules

pytest.importorskip("triton")

IDS = torch.arange(3, 15)[None]
SLOTS = {"all": 2, "some": 0, "late": 3}
HERE = "cuda" if HAS_GPU else "cpu"


class Case:
    """A model whose adapters lie in the slots of a pool: of everything, of two projections, and of the late layers."""

    def __init__(
        self,
        family: str = "llama",
        device: str = HERE,
        dtype: torch.dtype = torch.float32,
        layout: str = "plain",
        names: Collection[str] | None = None,
    ) -> None:
        self.model: PreTrainedModel = FAMILIES[family]().to(device, dtype)
        if layout == "joined":
            assert join_weights(self.model)
        if layout == "packed":
            pack_weights(self.model, True)
        sizes = {"num_rows": 64, "num_slots": 4} if device == "cuda" else {"grows_tables": True}
        layers, self.pool = wrap_all(self.model, names or target_modules(family), LoRAPool(device, dtype, **sizes))
        self.indices = {path: layer.lora_index for path, layer in layers.items()}
        parts = {
            "all": layers,
            "some": {p: layer for p, layer in layers.items() if p.endswith(("q_proj", "v_proj", "c_attn"))},
            "late": {p: layer for p, layer in layers.items() if ".2." in p},
        }
        for rank, (name, part) in enumerate(parts.items(), 3):
            tensors = random_tensors(part, 4 * rank, rank)
            self.pool.load(SLOTS[name], {self.indices[path]: t for path, t in tensors.items()})
        self.merger = ShadowMerger(self.model, layers)
        self.merger.allocate()

    def adapter(self, name: str) -> PooledAdapter:
        return PooledAdapter(self.pool, SLOTS[name], {index: path for path, index in self.indices.items()})

    def weights(self, name: str) -> PooledWeights:
        return PooledWeights(self.adapter(name), self.indices)

    def copies(self, name: str) -> dict[str, LayerTensors]:
        return {path: (w.A, w.B, w.scaling) for path, w in self.weights(name).items()}

    def merged(self, merger: ShadowMerger | None = None) -> dict[str, torch.Tensor]:
        """What a merged pass reads of each layer."""
        merger = merger or self.merger
        twins = {path: merger._covered.get(merger._sites.modules[path]) for path in self.indices}
        return {path: weight_of(twin or merger._sites.modules[path]).detach().clone() for path, twin in twins.items()}

    def logits(self) -> torch.Tensor:
        ids = IDS.to(self.model.device)
        return run(self.model, self.pool, self.merger, [-1], None, ids).clone()


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_GPU:
        triton_interpreter.mend()
        monkeypatch.setattr(pooled_merge, "can_merge_from_pool", lambda device: True)


def assert_same_weights(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for path, weight in expected.items():
        # Sums are taken in another order, and Triton's interpreter cuts bfloat16 off where torch rounds.
        step = 4e-6 if weight.dtype == torch.float32 else 1.01 * torch.finfo(weight.dtype).eps
        error = (got[path].float() - weight.float()).abs()
        assert (error <= step * weight.float().abs() + 1e-6).all(), path


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("family", "layout"),
    [("llama", "plain"), ("llama", "joined"), ("gpt2", "plain"), ("qwen2", "joined"), ("gemma2", "plain")],
)
@pytest.mark.parametrize("dtype", some_of([torch.float32, torch.bfloat16]))
def test_it_is_what_layer_by_layer_gives(family: str, layout: str, dtype: torch.dtype, device: str) -> None:
    case = Case(family, device, dtype, layout)
    before, base = digest(case.model), case.logits()
    for name in ("some", "all", "late", "some", "late", "all"):
        alone = ShadowMerger(case.model)
        alone.merge(case.copies(name))
        expected = case.merged(alone)
        assert case.merger.merge_pooled(case.adapter(name)) and case.merger.is_merged
        got = case.merged()
        assert_same_weights(got, expected)
        for path in set(expected) - set(case.copies(name)):
            assert torch.equal(got[path], case.merger.base_weight(path)), "no layer of the adapter"
        answer = case.logits()
        case.merger.unmerge()
        assert torch.equal(case.logits(), base) and not torch.equal(answer, base)
        assert case.merger.resume() and torch.equal(case.logits(), answer)
    assert digest(case.model) == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["plain", pytest.param("joined", marks=pytest.mark.slow)])
def test_what_is_merged_does_not_depend_on_the_past(layout: str, device: str) -> None:
    """Whichever way the switches before took."""
    case = Case(device=device, dtype=torch.bfloat16, layout=layout)
    before, base = digest(case.model), case.logits()
    fresh: dict[str, dict[str, torch.Tensor]] = {}
    rng = random.Random(0)
    for _ in range(60):
        name = rng.choice([*SLOTS, ""])
        if not name:
            case.merger.unmerge()
            assert torch.equal(case.logits(), base)
        elif rng.random() < 0.2:
            case.merger.merge(case.copies(name))
        else:
            assert case.merger.merge_pooled(case.adapter(name))
            got = case.merged()
            for path, weight in fresh.setdefault(name, got).items():
                assert torch.equal(got[path], weight), path
    case.merger.unmerge()
    assert digest(case.model) == before and torch.equal(case.logits(), base)


def out_of_memory(*_: object) -> None:
    raise MemoryError("no more memory")


@pytest.mark.parametrize("where", ["launch", "restore"])
def test_a_failure_in_the_middle_leaves_the_base(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_dist.kernels.merge_pool_triton import MergeTable

    case = Case(layout="joined")
    state = MergeState(case.model, "shadow", paths=list(case.indices))
    state.allocate()
    merger = case.merger = state._merger  # type: ignore[assignment]
    base = case.logits()
    state.switch("all", case.weights("all"))
    merged = case.merged()
    # k_proj's twin has to be restored, and no kernel does it: no adapter has a part there any more.
    del case.merger._pooled._indices[merger._sites.modules["model.layers.0.self_attn.k_proj"]]
    owner, name = {"launch": (MergeTable, "merge"), "restore": (torch, "_foreach_copy_")}[where]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, out_of_memory)
        with pytest.raises(MemoryError):
            state.switch("some", case.weights("some"))
    assert state.current is None and not state.holds("all") and not merger.resume()
    assert torch.equal(case.logits(), base)
    state.switch("some", case.weights("some"))
    got = case.merged()
    for path, weight in got.items():
        if path not in case.copies("some"):
            assert torch.equal(weight, state.base_weight(path)), path
    del got
    state.switch("all", dict(case.weights("all")))
    assert_same_weights(case.merged(), merged)


def never(*_: object) -> None:
    raise AssertionError("a copy of what lies in the pool")


def test_nothing_is_copied_out_of_the_pool_and_addresses_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_dist.kernels import merge_pool_triton

    case = Case()
    state = MergeState(case.model, "shadow", paths=list(case.indices))
    state.allocate()
    made: list[int] = []
    original: Callable[..., None] = merge_pool_triton.MergeTable.__init__
    monkeypatch.setattr(
        merge_pool_triton.MergeTable, "__init__", lambda self, items: made.append(1) or original(self, items)
    )
    monkeypatch.setattr(LoRAPool, "read_layer", never)
    for name in ("all", "some", "late", "some", "late", "all", "late"):
        state.switch(name, case.weights(name))
        assert state.current == name
    assert len(made) == 2, "of everything, which some over all is too; of late and some, whichever came first"


def test_what_has_moved_is_found_again() -> None:
    case = Case()
    assert case.merger.merge_pooled(case.adapter("all"))
    expected = case.merged()
    for path in case.indices:
        module = case.merger._sites.modules[path]
        old = module.weight.data
        module.weight.data = old.clone()
        old.fill_(float("nan"))
    if case.pool.num_rows is None:
        # Another adapter has the pool's buffers grow.
        layer = case.pool._layers[0]
        rows = len(layer.weights.A)
        case.pool.load(7, {0: (torch.ones(rows, layer.in_features), torch.ones(layer.out_features, rows), 1.0)})
        assert len(layer.weights.A) > rows
    assert case.merger.merge_pooled(case.adapter("all"))
    got = case.merged()
    for path, weight in expected.items():
        assert torch.equal(got[path], weight), path


@pytest.mark.parametrize("device", DEVICES)
def test_layers_that_no_adapter_targets_have_the_bases_weights(device: str) -> None:
    """Those joined with others, that is: a pass reads the twins of all."""
    case = Case(device=device, layout="joined", names=("q_proj", "v_proj", "gate_proj"))
    assert case.merger.merge_pooled(case.adapter("all"))
    sites = case.merger._sites.modules
    others = [path for path in sites if path.endswith(("k_proj", "up_proj"))]
    assert len(others) == 6
    for path in others:
        assert torch.equal(weight_of(case.merger._covered[sites[path]]), case.merger.base_weight(path))


def test_what_it_cannot_do_goes_layer_by_layer() -> None:
    without_twins, without_tables, packed = Case(), Case(), Case(device="cpu", layout="packed")
    without_twins.merger = ShadowMerger(without_twins.model)
    for layer in without_tables.pool.addressed_weights:
        layer.pages_t = None
    packs = any(map(packing_of, packed.merger._sites.modules.values()))
    for case in (without_twins, without_tables, *([packed] if packs else [])):
        before = case.merger.is_merged
        assert not case.merger.merge_pooled(case.adapter("all")) and case.merger.is_merged == before
        state = MergeState(case.model, "shadow")
        state._merger = case.merger
        state.switch("all", case.weights("all"))
        assert state.current == "all" and case.merger.is_merged


def test_weights_in_a_slot_are_read_when_somebody_looks() -> None:
    case = Case()
    weights = case.weights("some")
    assert set(weights) == {path for path in case.indices if path.endswith(("q_proj", "v_proj"))}
    assert len(weights) == len(set(weights)) and "model.layers.0.mlp.up_proj" not in weights
    path = next(iter(weights))
    A, B, scaling = case.pool.read(SLOTS["some"])[case.indices[path]]
    held: ModuleWeights = weights[path]
    assert torch.equal(held.A, A) and torch.equal(held.B, B) and held.scaling == scaling
