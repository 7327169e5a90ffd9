"""PEFT is the oracle: what we read of an adapter is what PEFT's own loader puts into its layers."""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import PreTrainedModel

from peft_dist.core.errors import AdapterError
from peft_dist.runner.adapter_config import _target_rule
from peft_dist.runner.adapter_modules import ModuleShape, describe_modules
from peft_dist.runner.adapter_patterns import PatternMap
from peft_dist.runner.adapter_tensors import LoadedAdapter, load_adapter
from tests.tiny_models import FAMILIES, target_modules

pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def base(family: str) -> PreTrainedModel:
    return FAMILIES[family]()


@functools.cache
def shapes(family: str) -> dict[str, ModuleShape]:
    return describe_modules(base(family))


def save(family: str, folder: Path, **config: Any) -> None:
    """A random adapter, written by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base(family)), LoraConfig(init_lora_weights=False, **config))
        model.save_pretrained(folder)


def peft_layers(family: str, folder: Path) -> dict[str, LoraLayer]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(copy.deepcopy(base(family)), folder)
    named = model.get_base_model().named_modules()
    return {name: module for name, module in named if isinstance(module, LoraLayer)}


def peft_weights(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    if "default" in layer.lora_A:
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]


def assert_as_peft(family: str, folder: Path) -> LoadedAdapter:
    ours, layers = load_adapter("a", folder, shapes(family)), peft_layers(family, folder)
    assert list(ours.weights) == sorted(layers)
    for path, layer in layers.items():
        a, b = peft_weights(layer)
        assert torch.equal(ours.weights[path].A.float(), a), path
        assert torch.equal(ours.weights[path].B.float(), b), path
        assert ours.weights[path].scaling == layer.scaling["default"], path
        assert ours.spec.ranks[path] == layer.r["default"] == ours.weights[path].rank, path
    return ours


PATTERNS = st.sampled_from(
    [
        "q_proj",
        "self_attn.q_proj",
        "^model.layers.1.self_attn.q_proj",
        r"model\.layers\.[02]\..*",
        r".*\.1\..*_proj",
        "layers.0.*",
        "down_proj|o_proj",
        "fc1",
        r"h.1.attn.c_attn",
        "c_(attn|proj)",
        "mlp.c_proj",
        "embed_tokens",
        "lm_head",
        "wte",
        "proj",
        "nothing",
    ]
)
RANKS = st.integers(1, 9)
ALPHAS = st.one_of(st.integers(1, 64), st.floats(0.1, 64.0, allow_nan=False))


@st.composite
def configurations(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    family = draw(st.sampled_from(["llama", "gpt2", "opt", "phi3", "qwen2"]))
    names = draw(st.lists(st.sampled_from(target_modules(family)), min_size=1, unique=True))
    config: dict[str, Any] = {
        "r": draw(RANKS),
        "lora_alpha": draw(ALPHAS),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(st.dictionaries(PATTERNS, RANKS, max_size=3)),
        "alpha_pattern": draw(st.dictionaries(PATTERNS, ALPHAS, max_size=3)),
    }
    form = draw(st.sampled_from(["list", "regex", "all-linear", "paths"]))
    config["target_modules"] = {
        "list": names,
        "regex": rf".*\.({'|'.join(names)})|lm_head",
        "all-linear": "all-linear",
        "paths": [path for path in shapes(family) if path.rsplit(".", 1)[-1] in names][::2],
    }[form]
    if form == "list":
        layers = st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 2), min_size=1, unique=True))
        config["layers_to_transform"] = draw(layers)
        if config["layers_to_transform"] is not None:
            config["layers_pattern"] = draw(st.sampled_from([None, "layers", ["layers", "h"]]))
    config["exclude_modules"] = draw(st.sampled_from([None, ["k_proj", "c_proj"], r".*\.1\..*", ["lm_head"]]))
    return family, config


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(configurations())
def test_random_adapters_are_read_as_peft_reads_them(drawn):
    family, config = drawn
    with tempfile.TemporaryDirectory() as folder:
        try:
            save(family, Path(folder), **config)
        except ValueError:  # nothing is left to adapt
            assume(False)
        try:
            peft_layers(family, Path(folder))
        except RuntimeError:  # saving sorted overlapping patterns, and PEFT itself cannot read the result
            with pytest.raises(AdapterError, match="rank"):
                load_adapter("a", Path(folder), shapes(family))
        else:
            assert_as_peft(family, Path(folder))


def test_overlapping_patterns_that_saving_reordered(tmp_path):
    """PEFT trains with the patterns' own order, saves them sorted, and then cannot load its own file."""
    patterns = {"q_proj": 2, "layers.0.*": 3}
    save("llama", tmp_path, r=4, target_modules=["q_proj"], rank_pattern=patterns)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft_layers("llama", tmp_path)
    with pytest.raises(AdapterError, match=r"layers\.0\..* has rank 2 .* says 3 .*overlapping"):
        load_adapter("a", tmp_path, shapes("llama"))
    save("llama", tmp_path, r=4, target_modules=["q_proj"], alpha_pattern=patterns)
    assert assert_as_peft("llama", tmp_path).weights["model.layers.0.self_attn.q_proj"].scaling == 3 / 4


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_module_of_every_family(family, tmp_path):
    names = target_modules(family)
    save(family, tmp_path, r=3, lora_alpha=5, target_modules=names)
    ours = assert_as_peft(family, tmp_path)
    adapted = {path.rsplit(".", 1)[-1] for path in ours.weights}
    assert adapted == set(names)


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embedding(tied, tmp_path):
    save("qwen2", tmp_path, r=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=tied)
    assert set(assert_as_peft("qwen2", tmp_path).weights) == {"model.embed_tokens", "lm_head"}


def test_embedding_alone_ties_the_head(tmp_path):
    save("qwen2", tmp_path, r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    assert "lm_head" in assert_as_peft("qwen2", tmp_path).weights


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "mica", True])
def test_initialisations_that_leave_the_base_alone(init, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, init_lora_weights=init, target_modules=["q_proj"])
        get_peft_model(copy.deepcopy(base("llama")), config).save_pretrained(tmp_path)
    assert_as_peft("llama", tmp_path)


def test_converted_pissa(tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
    model = get_peft_model(copy.deepcopy(base("llama")), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "raw")
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        load_adapter("a", tmp_path / "raw", shapes("llama"))
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert assert_as_peft("llama", tmp_path / "plain").spec.max_rank == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files(dtype, tmp_path):
    model = get_peft_model(
        copy.deepcopy(base("llama")).to(dtype),
        LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "up_proj", "embed_tokens"]),
        autocast_adapter_dtype=False,
    )
    model.save_pretrained(tmp_path)
    assert next(iter(assert_as_peft("llama", tmp_path).weights.values())).A.dtype == dtype


def test_a_peft_model_is_described_as_its_base():
    model = get_peft_model(copy.deepcopy(base("gpt2")), LoraConfig(r=2, target_modules=["c_attn", "wte"]))
    assert describe_modules(model) == shapes("gpt2")
    assert describe_modules(model.get_base_model()) == shapes("gpt2")
    assert shapes("gpt2")["transformer.h.0.attn.c_attn"] == ModuleShape("conv1d", 32, 96)
    assert shapes("gpt2")["transformer.wte"] == ModuleShape("embedding", 96, 32)
    assert shapes("gpt2")["lm_head"] == ModuleShape("linear", 32, 96)


PARTS = st.sampled_from(["model", "layers", "h", "0", "1", "12", "q_proj", "k_proj", "attn", "q.proj", "lm_head"])
PATHS = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
NAMES = st.one_of(
    PATHS, st.sampled_from(["proj", "^model.*", r".*\d.*", "q.proj", "(q|k)_proj", "", r"\d+", "a)|(q_proj"])
)
NUMBERS = st.one_of(st.none(), st.integers(0, 12), st.lists(st.sampled_from([0, 1, 12]), max_size=2))


@settings(max_examples=250, deadline=None)
@given(st.lists(NAMES, max_size=4, unique=True), PATHS)
def test_patterns_choose_as_peft(patterns, path):
    chosen = PatternMap({pattern: pattern for pattern in patterns}, "rank_pattern").get(path, path)
    assert chosen == get_pattern_key(patterns, path)


@settings(max_examples=600, deadline=None)
@given(
    targets=st.one_of(st.lists(NAMES, max_size=3), PATHS, st.sampled_from([r".*\.(q|k)_proj", "lm_head"])),
    excluded=st.one_of(st.none(), st.lists(PATHS, max_size=2), PATHS),
    layers=NUMBERS,
    containers=st.sampled_from([None, "layers", ["h", "layers"], []]),
    path=PATHS,
)
def test_targets_are_chosen_as_peft_chooses(targets, excluded, layers, containers, path):
    if isinstance(targets, str):
        layers = containers = None
    elif layers is None:
        containers = None
    fields = {"exclude_modules": excluded, "layers_to_transform": layers, "layers_pattern": containers}
    rule = _target_rule({"target_modules": targets, **fields})
    expected = bool(check_target_module_exists(LoraConfig(target_modules=targets, **fields), path))
    assert rule.allows(path, "linear") == rule.requires(path, "linear") == expected


class _Wrapper(nn.Module):
    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(2, 2)


def test_wrapped_layers_count_as_their_base():
    model = nn.ModuleDict({"a": _Wrapper(_Wrapper(nn.Linear(3, 5))), "ab": nn.Embedding(7, 4)})
    assert describe_modules(model) == {"a": ModuleShape("linear", 3, 5), "ab": ModuleShape("embedding", 7, 4)}
