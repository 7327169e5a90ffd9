"""A good adapter on a small Llama, ways to spoil it, and what must come of that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_dist.core.errors import AdapterError
from peft_dist.runner.adapter_modules import describe_modules
from peft_dist.runner.adapter_tensors import LoadedAdapter, inspect_adapter, load_adapter
from tests.tiny_models import FAMILIES, random_adapter

Tensors = dict[str, torch.Tensor]
MODEL = FAMILIES["llama"]()
MODULES = describe_modules(MODEL)
Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter of rank 4 on q_proj and v_proj."""
    return random_adapter(MODEL, tmp_path / "adapter", r=4)


def load(folder: Path, **options: Any) -> LoadedAdapter:
    """Read whole; reading it piece by piece must tell the same identity."""
    adapter = load_adapter("sql", folder, MODULES, **options)
    assert inspect_adapter("sql", folder, MODULES, **options) == adapter.spec
    return adapter


def refused(folder: Path, *words: str, **options: Any) -> None:
    with pytest.raises(AdapterError) as caught:
        load(folder, **options)
    message = str(caught.value)
    with pytest.raises(AdapterError) as caught:
        inspect_adapter("sql", folder, MODULES, **options)
    assert str(caught.value) == message
    assert message.startswith(f"adapter 'sql' in {folder}: ")
    for word in words:
        assert word in message, message


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
