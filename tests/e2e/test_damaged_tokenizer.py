"""A model whose tokenizer is damaged is refused in words, and nothing of it stays in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from peft_dist import LLM
from peft_dist.core.errors import ConfigError
from tests.e2e.test_llm import make_tokenizer
from tests.e2e.test_serve import failing
from tests.tiny_models import make_model, random_adapter

torch.set_num_threads(1)
DAMAGE = [("tokenizer.json", "{ broken"), ("tokenizer.json", '{"version": "1.0"}'), ("tokenizer_config.json", "[")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizer")
    model = make_model("llama", root / "model")
    make_tokenizer().save_pretrained(root / "model")
    random_adapter(model, root / "a0")
    return root


def damaged(folder: Path, tmp_path: Path, file: str, text: str) -> Path:
    model = tmp_path / "damaged"
    shutil.copytree(folder / "model", model)
    (model / file).write_text(text)
    return model


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[LLM]:
    """Every LLM that was closed."""
    found: list[LLM] = []
    close = LLM.close
    monkeypatch.setattr(LLM, "close", lambda self: (found.append(self), close(self))[1])
    return found


@pytest.mark.parametrize(("file", "text"), DAMAGE)
def test_it_names_its_folder_and_frees_the_model(
    folder: Path, tmp_path: Path, closed: list[LLM], file: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer of .*damaged.*save_pretrained"):
        LLM(damaged(folder, tmp_path, file, text), device="cpu", num_blocks=64)
    assert [llm._replica for llm in closed] == [None]


def test_whatever_ends_the_making_frees_the_model(
    folder: Path, closed: list[LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "_load_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LLM(folder / "model", {"a0": folder / "a0"}, device="cpu", num_blocks=64)
    assert [llm._replica for llm in closed] == [None]


@pytest.mark.slow
def test_the_server_says_so_in_one_line(folder: Path, tmp_path: Path) -> None:
    model = damaged(folder, tmp_path, *DAMAGE[0])
    status, output = failing("--launcher", "plain", "--device", "cpu", "--port", "0", "--num-blocks", "64", model=model)
    assert status == 1 and "Traceback" not in output
    assert f"peft-dist: cannot load the tokenizer of '{model}'" in output.splitlines()[-1]
