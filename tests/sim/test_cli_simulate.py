"""``peft-dist simulate``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_dist.cli import app
from peft_dist.core.errors import ConfigError
from peft_dist.workload import records

SMALL = ["--rate", "9", "--requests", "40", "--adapters", "6", "--popularity", "zipf", "--replicas", "2"]


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["simulate", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_two_runs_write_the_same_files(tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        files = [tmp_path / f"{name}.json", tmp_path / f"{name}.csv"]
        told = call(*SMALL, "--seed", "5", "--output", str(files[0]), "--csv", str(files[1]))
        assert "simulated: 2 x paper-7b" in told and "per output token" in told and "share of queueing" in told
        texts.append([file.read_bytes() for file in files])
    assert texts[0] == texts[1]
    source = json.loads(texts[0][0])["source"]
    assert source["simulated"] is True and source["options"]["seed"] == source["workload"]["seed"] == 5
    assert records.read_json(tmp_path / "a.json").records[0].error is None
    rows = list(csv.DictReader(line for line in texts[0][1].decode().splitlines() if not line.startswith("#")))
    assert len(rows) == 40 and float(rows[0]["normalized_latency"]) > 0.015


def test_a_written_workload_gives_what_the_generated_one_gives(tmp_path: Path) -> None:
    runner, load = CliRunner(), tmp_path / "load.jsonl"
    runner.invoke(app, ["workload", "write", str(load), *SMALL[:-2]], catch_exceptions=False)
    for name, options in (("a", [str(load), "--replicas", "2"]), ("b", SMALL)):
        call(*options, "--output", str(tmp_path / name))
    first, second = (records.read_json(tmp_path / name).records for name in "ab")
    assert first == second


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--rate and --requests"),
        (["load.jsonl", "--rate", "1"], "leave out --rate"),
        ([*SMALL, "--profile", "mine"], "no profile 'mine'"),
        ([*SMALL, "--exec-type", "slora"], "exec_type='slora'"),
        ([*SMALL, "--plan", "cbc"], "plan='cbc'"),
        ([*SMALL, "--policy", "lifo"], "policy='lifo'"),
        ([*SMALL, "--output", "/nowhere/run.json"], "no folder /nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_it_runs(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call(*options)
