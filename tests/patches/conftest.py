"""Adapter folders, written once, and models made anew for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

from tests.patches import oracle
from tests.tiny_models import FAMILIES


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("adapters")
    return {family: oracle.write_adapters(family, folder) for family in FAMILIES}


@pytest.fixture
def llama(adapters: dict[str, dict[str, Path]]) -> PeftModel:
    return oracle.load("llama", adapters["llama"])


@pytest.fixture
def make(adapters: dict[str, dict[str, Path]]) -> Callable[..., PeftModel]:
    """``make(family, names=...)``: an unpatched model."""
    return lambda family="llama", *names: oracle.load(family, adapters[family], *([names] if names else []))
