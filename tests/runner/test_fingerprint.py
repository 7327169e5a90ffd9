"""Equal for equal models, whatever holds them; another for a fine-tune."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from peft_dist.core.config import EngineConfig
from peft_dist.patches.sharding import shard_model
from peft_dist.runner.fingerprint import Fingerprint
from peft_dist.runner.loader import load_model
from tests.tiny_models import FAMILIES, make_model


def mark(folder: Path, **options: object) -> str:
    config = replace(EngineConfig(str(folder), device="cpu"), **options)  # type: ignore[arg-type]
    found = Fingerprint(config)
    found.see(load_model(config, torch.device("cpu")))
    return found.text


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    made = FAMILIES["llama"]()
    made.save_pretrained(tmp_path / "a")
    return made


def test_it_is_the_same_in_other_files_dtypes_and_ranks(model: PreTrainedModel, tmp_path: Path) -> None:
    expected = mark(tmp_path / "a", dtype="float32")
    model.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    assert mark(tmp_path / "b", dtype="float32") == expected == mark(tmp_path / "a", dtype="bfloat16")
    for rank in range(2):
        config = EngineConfig(str(tmp_path / "a"), device="cpu", dtype="float32", tensor_parallel_size=2)
        found = Fingerprint(config)
        split = load_model(config, torch.device("cpu"), found.before(lambda whole, r=rank: shard_model(whole, r, 2)))
        found.see(split)
        assert found.text == expected


def test_a_fine_tune_has_another(model: PreTrainedModel, tmp_path: Path) -> None:
    expected = mark(tmp_path / "a")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight.mul_(1.01)
    model.save_pretrained(tmp_path / "tuned")
    assert mark(tmp_path / "tuned") != expected


def test_other_settings_are_another_model(model: PreTrainedModel, tmp_path: Path) -> None:
    expected = mark(tmp_path / "a")
    model.config.rms_norm_eps = 1e-3
    model.save_pretrained(tmp_path / "other")
    assert mark(tmp_path / "other") != expected


def test_every_column_counts(model: PreTrainedModel, tmp_path: Path) -> None:
    expected = mark(tmp_path / "a")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight[:, 1:].mul_(1.01)
    model.save_pretrained(tmp_path / "tuned")
    assert mark(tmp_path / "tuned") != expected


def test_defaults_of_a_library_are_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path / "a")
    expected = mark(tmp_path / "a")
    monkeypatch.setattr(LlamaConfig, "a_new_setting", 5, raising=False)
    full = LlamaConfig.to_diff_dict
    monkeypatch.setattr(LlamaConfig, "to_diff_dict", lambda self: {**full(self), "a_new_setting": 5})
    assert mark(tmp_path / "a") == expected


def test_random_weights_are_known_by_their_seed(tmp_path: Path) -> None:
    make_model("llama", tmp_path / "a")
    first, again, other = (mark(tmp_path / "a", load_format="dummy", seed=seed) for seed in (1, 1, 2))
    assert first == again != other
