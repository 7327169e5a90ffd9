"""The example scripts, run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.patches import oracle
from tests.tiny_models import make_model

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "scripts" / "examples" / "batch_generate.py"
NAMES = ["wide", "__base__", "late", "narrow", "wide"]


def run(*command: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {key: value for key, value in environment.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture
def options(tmp_path: Path, adapters: dict[str, dict[str, Path]]) -> list[str]:
    make_model("llama", tmp_path / "model")
    ids = oracle.inputs(padded=False)["input_ids"].tolist()
    rows = [{"adapter": name, "prompt": row[: 4 + 2 * i]} for i, (name, row) in enumerate(zip(NAMES, ids, strict=True))]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = [f"--adapter={name}={adapters['llama'][name]}" for name in ("wide", "narrow", "late")]
    return [
        "--model",
        str(tmp_path / "model"),
        "--prompts",
        str(tmp_path / "prompts.jsonl"),
        "--max-new-tokens=8",
        *chosen,
    ]


TWO = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", str(EXAMPLE)]
ONE = [sys.executable, str(EXAMPLE), "--processes", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [TWO, ONE], ids=["two", "one"])
def test_any_number_of_processes_gives_pefts_answers_in_order(
    command: list[str], options: list[str], adapters: dict[str, dict[str, Path]]
) -> None:
    rows = run(*command, *options)
    assert [row["adapter"] for row in rows] == NAMES
    model = oracle.load("llama", adapters["llama"])
    for row in rows:
        ids = torch.tensor([row["prompt"]])
        call = lambda ids=ids: model.generate(ids, max_new_tokens=8, do_sample=False)  # noqa: E731
        expected = oracle.alone(model, row["adapter"], call)[0, ids.shape[1] :].tolist()
        assert row["token_ids"] == (expected[: expected.index(2)] if 2 in expected else expected)


def test_world_of_another_size_is_refused(options: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "3", "RANK": "0"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 1 and "3 processes were started but 2 are wanted" in done.stderr
