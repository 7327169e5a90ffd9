"""What is no base model is refused with words that fit."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.runner.loader import check_libraries, load_model


def refusal(model: str) -> str:
    with pytest.raises(ConfigError, match="cannot load the base model") as caught:
        load_model(EngineConfig(model, device="cpu"), torch.device("cpu"))
    return str(caught.value)


@pytest.mark.parametrize("model", ["/nonexistent/model", "./nonexistent", "../nonexistent", "~/nonexistent", "a/b/c"])
def test_a_path_that_does_not_exist_is_no_hub_id(model: str) -> None:
    assert f"{model!r}: there is no such folder. Correct the path" in refusal(model)


def test_an_adapter_is_no_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    message = refusal(str(tmp_path))
    assert "it is an adapter" in message and "--adapter NAME=PATH" in message


def test_a_folder_without_a_model_is_told_in_whole_sentences(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    message = refusal(str(tmp_path))
    assert ".. " not in message and message.endswith("or a hub id that is reachable or cached")


def test_an_engine_refuses_the_libraries_that_the_drop_in_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stand on the same patches: an answer of code that nobody has seen may be wrong."""
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.99" if name == "transformers" else real(name))
    with pytest.raises(ConfigError, match=r"tested with transformers >=5.*installed is 5\.99"):
        check_libraries()


def test_a_length_beyond_the_models_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    LlamaConfig(max_position_embeddings=64, num_hidden_layers=1).save_pretrained(tmp_path)  # And no weights.
    with pytest.raises(ConfigError, match=r"max_model_len=65 exceeds what the model supports \(64\)"):
        load_model(EngineConfig(str(tmp_path), device="cpu", max_model_len=65), torch.device("cpu"))
