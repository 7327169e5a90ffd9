"""What the offline interface is given by mistake is refused in words, runs nothing, and leaves it usable."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_dist import LLM, SamplingParams
from peft_dist.core.errors import AdapterError, ConfigError, InvalidRequestError, PeftDistError, UnknownModelError
from tests.e2e.test_llm import make_tokenizer
from tests.tiny_models import make_model, random_adapter

torch.set_num_threads(1)
GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
USER = {"role": "user", "content": "hi"}
IDS = [5, 6, 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    model = make_model("llama", root / "model")
    make_tokenizer().save_pretrained(root / "model")
    random_adapter(model, root / "a0")
    return root


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder / "model", {"a0": folder / "a0"}, device="cpu", num_blocks=64, served_model_name="tiny") as made:
        yield made


def refused(llm: LLM, call: Callable[[], object], error: type[PeftDistError], *words: str) -> PeftDistError:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), caught.value
    assert not llm._open.engine.has_work and llm._orchestrator.num_unfinished == 0
    [output] = llm.generate([IDS], GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3
    return caught.value


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([[-1]], "-1"),
        ([IDS, [2**70]], str(2**70)),
        ([IDS, [96]], "96"),
        ("\ud800", "lone surrogate"),
        (["fine", "half \udc00"], "lone surrogate"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        (None, "NoneType"),
        (5, "int"),
        ((text for text in ["a", "b"]), "list(prompts)"),
        ({1, 2}, "set"),
        (b"abc", "bytes"),
        ([b"abc"], "no prompt"),
        ([None], "no prompt"),
        ([5, "a"], "no prompt"),
        ([True, False], "no prompt"),
        ([[True, False]], "no prompt"),
        ([[1.0]], "no prompt"),
        ([[[1]]], "no prompt"),
        (np.array([1.5]), "no prompt"),
        (torch.tensor(5), "int"),
        ({}, "no prompt"),
        ({"prompt_token_ids": None}, "prompt_token_ids=None"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids='abc'"),
        ({"prompt_token_ids": [[1, 2]]}, "prompt_token_ids=[[1, 2]]"),
        ({"prompt_token_ids": IDS, "prompt": 5}, "prompt=5"),
        ({"prompt": 5}, "no prompt"),
    ],
)
def test_prompts_that_are_none(llm: LLM, prompts: Any, words: str) -> None:
    error = refused(llm, lambda: llm.generate(prompts, GREEDY, use_tqdm=False), InvalidRequestError, words)
    assert error.param == "prompt"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "prompt",
    [np.array(IDS), np.array(IDS, dtype=np.uint8), torch.tensor(IDS), array("i", IDS), tuple(IDS), range(5, 8)],
)
def test_ids_come_in_every_kind_of_array(llm: LLM, prompt: Any) -> None:
    kinds = [prompt, [prompt], {"prompt_token_ids": prompt}, list(prompt)]
    for kind in kinds[: 3 if isinstance(prompt, torch.Tensor) else 4]:
        [output] = llm.generate(kind, GREEDY, use_tqdm=False)
        assert output.prompt_token_ids == IDS and all(type(token) is int for token in output.prompt_token_ids)
    rows = llm.generate(np.array([IDS, IDS]), GREEDY, use_tqdm=False)
    assert [row.prompt_token_ids for row in rows] == [IDS, IDS]


def test_no_prompts_are_no_error(llm: LLM) -> None:
    assert llm.generate([], use_tqdm=False) == [] and llm.chat([], use_tqdm=False) == []


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"temperature": 0}, "SamplingParams(temperature=...)"),
        ([None], "sampling_params[0]"),
        ([{}], "sampling_params[0]"),
        (5, "int"),
        ("greedy", "str"),
        ((GREEDY for _ in range(1)), "generator"),
        ([GREEDY, GREEDY], "2 sampling_params for 1 prompts"),
    ],
)
def test_parameters_that_are_none(llm: LLM, params: Any, words: str) -> None:
    for ask in (lambda: llm.generate([IDS], params, use_tqdm=False), lambda: llm.chat([USER], params, use_tqdm=False)):
        error = refused(llm, ask, InvalidRequestError, words)
        assert error.param == "sampling_params"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("names", "words"), [([5], "adapter_names[0]=5"), (5, "int"), ({"a0": 1}, "dict"), ([["a0"]], "adapter_names[0]")]
)
def test_adapter_names_that_are_none(llm: LLM, names: Any, words: str) -> None:
    for ask in (lambda: llm.generate([IDS], GREEDY, names, use_tqdm=False), lambda: llm.chat([USER], GREEDY, names)):
        error = refused(llm, ask, InvalidRequestError, words)
        assert error.param == "adapter_names"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "str"),
        (None, "NoneType"),
        (5, "int"),
        (USER, "dict"),
        (["hello"], "messages[0]"),
        ([[]], "messages[0]"),
        ([["a"]], "messages[0][0]"),
        ([[USER], [USER, 5]], "messages[1][1]"),
        ([{"role": "user"}], "content"),
        ([{"content": "hi"}], "role"),
        ([{"role": 5, "content": "hi"}], "role"),
        ([{"role": "user", "content": 5}], "text parts"),
        ([{"role": "", "content": "hi"}], "template"),
        ([{"role": "user", "content": "\ud800"}], "lone surrogate"),
    ],
)
def test_conversations_that_are_none(llm: LLM, messages: Any, words: str) -> None:
    error = refused(llm, lambda: llm.chat(messages, GREEDY, use_tqdm=False), InvalidRequestError, words)
    assert error.param == "messages"  # type: ignore[attr-defined]


def test_templates_that_fail_or_are_missing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for template, words in (("{% broken", "template"), ("{{ 1 / 0 }}", "zero"), (5, "template")):
        ask = lambda: llm.chat([USER], GREEDY, chat_template=template)  # noqa: B023, E731
        refused(llm, ask, InvalidRequestError, words)
    refused(llm, lambda: llm.chat([USER], GREEDY, tokenize=True), InvalidRequestError, "tokenize")
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    error = refused(llm, lambda: llm.chat([USER], GREEDY), InvalidRequestError, "chat_template=", "generate")
    assert error.param == "chat_template"  # type: ignore[attr-defined]
    [output] = llm.chat([USER], GREEDY, chat_template="{{ messages[0].content }}", use_tqdm=False)
    assert output.prompt == "hi"


def test_adapters_by_wrong_names_and_paths(llm: LLM, folder: Path) -> None:
    for name in (5, None, ["x"]):
        refused(llm, lambda name=name: llm.load_adapter(folder / "a0", name), AdapterError, f"name={name!r}")
        refused(llm, lambda name=name: llm.unload_adapter(name), UnknownModelError, f"{name!r}")
    for path in (5, None, ["x"]):
        refused(llm, lambda path=path: llm.load_adapter(path, "x"), AdapterError, f"path={path!r}")
    assert [spec.name for spec in llm.adapters] == ["a0"]


@pytest.mark.parametrize("adapters", [["a0"], "a0", Path("a0"), 5])
def test_adapters_that_are_no_map_are_known_before_the_model_loads(adapters: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapters=.* must map names to"):
        LLM(tmp_path / "no model", adapters)
