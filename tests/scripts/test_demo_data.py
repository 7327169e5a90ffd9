"""The demo rows are disjoint, repeatable and well formed, and the committed adapters are what their cards say."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from demo_data import adapters, prompts, rows, sql, tasks

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ADAPTERS = SCRIPTS / "demo_adapters"
NAMES = ("sql", "json", "sentiment", "style")
ALL_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TRAIN_ROWS = 1200


def _header(path: Path) -> dict[str, Any]:
    """Read a safetensors header without loading the tensors."""
    with path.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header


def _tensors(name: str) -> dict[str, Any]:
    return _header(ADAPTERS / name / "adapter_model.safetensors")


def _config(name: str) -> dict[str, Any]:
    return json.loads((ADAPTERS / name / "adapter_config.json").read_text())


@pytest.mark.parametrize("task", NAMES)
def test_heldout_rows_share_nothing_with_training(task: str) -> None:
    train, heldout = tasks.training_and_heldout(task, TRAIN_ROWS)
    assert len(train) == TRAIN_ROWS
    assert len({row.user for row in heldout}) == len(heldout) >= 200
    assert not {w.lower() for row in train for w in row.words} & {w.lower() for row in heldout for w in row.words}
    assert not {t for row in train for t in row.templates} & {t for row in heldout for t in row.templates}


def test_a_leaked_word_or_template_is_reported() -> None:
    train = [rows.Row("a?", "x", ("template one",), ("lamp",))]
    with pytest.raises(rows.LeakError, match=r"word.*lamp"):
        rows.assert_disjoint(train, [rows.Row("b?", "x", ("template two",), ("Lamp",))])
    with pytest.raises(rows.LeakError, match="template"):
        rows.assert_disjoint(train, [rows.Row("b?", "x", ("template one",), ("sofa",))])
    with pytest.raises(rows.LeakError, match="question"):
        rows.assert_disjoint(train, [rows.Row("a?", "x", ("template two",), ("sofa",))])


@pytest.mark.parametrize("task", NAMES)
def test_rows_depend_on_the_seed_alone(task: str) -> None:
    assert tasks.make_rows(task, "train", 60) == tasks.make_rows(task, "train", 60)
    assert tasks.make_rows(task, "train", 60, seed=1) != tasks.make_rows(task, "train", 60, seed=2)


@pytest.mark.parametrize("task", NAMES)
def test_the_judge_accepts_every_answer_of_its_own(task: str) -> None:
    for split in ("train", "heldout"):
        for row in tasks.make_rows(task, split, 200):
            assert tasks.TASKS[task].judge(row.answer, row.answer), row


def test_sql_answers_are_canonical_and_name_only_columns_of_the_schema() -> None:
    for row in tasks.make_rows("sql", "train", 500) + tasks.make_rows("sql", "heldout", 200):
        assert sql.is_canonical(row.answer), row.answer
        schema = row.user.splitlines()[0].removeprefix("Table: ")
        table, columns = schema.rstrip(")").split("(")
        assert f" FROM {table}" in row.answer
        assert (
            any(column in row.answer for column in columns.split(", ")) or "COUNT(*)" in row.answer or "*" in row.answer
        )
    assert not sql.is_canonical("select name from cats")
    assert not sql.is_canonical("SELECT name FROM cats WHERE age = 3;")


def test_json_answers_hold_the_requested_keys_and_values_from_the_sentence() -> None:
    for row in tasks.make_rows("json", "train", 500) + tasks.make_rows("json", "heldout", 200):
        answer = json.loads(row.answer)
        request, sentence = row.user.splitlines()
        assert request == f"Extract {', '.join(answer)} from the sentence and answer with JSON only."
        assert all(str(value) in sentence for value in answer.values())
        assert len({str(value) for value in answer.values()}) == len(answer)


@pytest.mark.parametrize(
    ("task", "text", "answer", "right"),
    [
        ("sql", "```sql\nSELECT a\nFROM t;\n```", "SELECT a FROM t;", True),
        ("sql", "SELECT b FROM t;", "SELECT a FROM t;", False),
        ("json", 'Here: {"b": 2, "a": "x"}', '{"a": "x", "b": 2}', True),
        ("json", '{"a": "x", "b": "2"}', '{"a": "x", "b": 2}', False),
        ("json", "no object", '{"a": "x"}', False),
        ("sentiment", "The review is Positive.", "positive", True),
        ("sentiment", "positive and negative", "positive", False),
        ("sentiment", "good", "positive", False),
        ("style", "Arr, water be good for ye, matey!", "", True),
        ("style", "Water is good for you, matey.", "", False),
        ("style", "Arr, matey! " + "water " * 50, "", False),
    ],
)
def test_judges(task: str, text: str, answer: str, right: bool) -> None:
    assert tasks.TASKS[task].judge(text, answer) is right


def test_demo_prompts_are_in_the_trained_format_and_not_training_rows() -> None:
    assert set(prompts.DEMO_PROMPTS) == {*NAMES, "base"}
    for name, messages in prompts.DEMO_PROMPTS.items():
        assert len(messages) == len(set(messages)) >= 5
        if name != "base":
            spec_rows = adapters.SPECS[name].rows
            assert not set(messages) & {row.user for row in tasks.make_rows(name, "train", spec_rows)}
    with pytest.raises(ValueError, match="unknown task"):
        prompts.user_message("poetry", "x")


def test_the_clock_steers_training_only_on_a_machine_that_is_too_slow() -> None:
    pytest.importorskip("datasets")
    from train_demo_adapters import progress_of

    assert progress_of(0, 100, 4.0, 9.0) == 0.0
    assert progress_of(60, 100, 5.0, 9.0) == 0.6
    assert progress_of(30, 100, 6.0, 9.0) == pytest.approx(6 / 9)
    assert progress_of(99, 100, 9.0, 9.0) == 1.0


def test_together_the_specs_touch_every_linear() -> None:
    specs = adapters.SPECS
    assert set(specs) == set(NAMES)
    assert {target for spec in specs.values() for target in spec.targets} == ALL_LINEARS


def test_the_adapters_on_disk_touch_every_linear() -> None:
    touched = {part for name in NAMES for key in _tensors(name) for part in key.split(".") if part.endswith("_proj")}
    assert touched == ALL_LINEARS


@pytest.mark.parametrize("name", NAMES)
def test_adapter_folder_is_small_and_complete(name: str) -> None:
    folder = ADAPTERS / name
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    wanted = {"adapter_config.json", "adapter_model.safetensors", "README.md", "training.json", "scores.json"}
    assert set(files) == wanted
    assert sum(files.values()) < 3_000_000


@pytest.mark.parametrize("name", NAMES)
def test_adapter_matches_its_spec(name: str) -> None:
    spec, config, tensors = adapters.SPECS[name], _config(name), _tensors(name)
    assert config["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (spec.rank, spec.alpha, spec.rslora)
    assert config["rank_pattern"] == spec.rank_pattern
    assert set(config["target_modules"]) == set(spec.targets)
    layers = spec.layers or tuple(range(30))
    assert len(tensors) == 2 * len(spec.targets) * len(layers)
    for key, entry in tensors.items():
        parts = key.split(".")
        module = next(part for part in parts if part.endswith("_proj"))
        rank = spec.rank_pattern.get(module, spec.rank)
        assert entry["dtype"] == "BF16"
        assert entry["shape"]["lora_B" in parts] == rank
        assert int(parts[parts.index("layers") + 1]) in layers


@pytest.mark.parametrize("name", NAMES)
def test_scores_meet_the_limits(name: str) -> None:
    spec = adapters.SPECS[name]
    scores = json.loads((ADAPTERS / name / "scores.json").read_text())
    assert scores["adapter"]["score"] >= spec.target_score


@pytest.mark.parametrize("name", NAMES)
def test_scores_stand_in_the_card(name: str) -> None:
    spec = adapters.SPECS[name]
    scores = json.loads((ADAPTERS / name / "scores.json").read_text())
    assert scores["rows"] >= 200
    assert scores["base"]["score"] < spec.base_limit
    card = (ADAPTERS / name / "README.md").read_text()
    assert f"{scores['adapter']['right']} of {scores['rows']}" in card
    assert f"{scores['base']['right']} of {scores['rows']}" in card
