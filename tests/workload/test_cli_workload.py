"""``peft-dist workload`` from its options to files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner, Result

from peft_dist import cli
from peft_dist.core.errors import ConfigError
from peft_dist.workload import files, synthetic

COMMON = ["--rate", "5", "--requests", "60", "--adapters", "4"]


def write(file: Path, *options: str) -> Result:
    return CliRunner().invoke(cli.app, ["workload", "write", str(file), *COMMON, *options])


def test_without_files_everything_is_synthetic_and_says_so(tmp_path: Path) -> None:
    shown = write(tmp_path / "a.jsonl", "--seed", "3")
    assert shown.exit_code == 0, shown.exception
    made = files.read(tmp_path / "a.jsonl")
    assert len(made.arrivals) == 60 and set(made.adapters) <= {f"adapter-{i}" for i in range(4)}
    assert made.source["seed"] == 3
    for words in ("synthetic, fitted to Shahrad", "synthetic: log-normals", "60 requests"):
        assert words in shown.output
    write(tmp_path / "b.jsonl", "--seed", "3")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_traces_shares_and_lengths_of_ones_own(tmp_path: Path) -> None:
    unwritten = CliRunner().invoke(cli.app, ["workload", "trace", str(tmp_path / "missing" / "day.csv.gz")]).exception
    assert isinstance(unwritten, ConfigError) and "day.csv.gz cannot be written: No such file" in str(unwritten)
    shown = CliRunner().invoke(cli.app, ["workload", "trace", str(tmp_path / "day.csv.gz"), "--functions", "60"])
    assert shown.exit_code == 0 and synthetic.ORIGIN in shown.output
    maf1 = ["--maf1", str(tmp_path / "day.csv.gz"), "--need-sort", "--stride", "2", "--window", "0.9.0-0.15.0"]
    assert write(tmp_path / "a.csv", *maf1, "--fixed-lengths", "12,34").exit_code == 0
    made = files.read(tmp_path / "a.csv")
    assert {(a.prompt_tokens, a.output_tokens) for a in made.arrivals} == {(12, 34)}
    assert made.source["intervals"] == 6 and made.source["stride"] == 2
    assert "Azure Functions 2019, day.csv.gz" in made.source["arrivals"]
    (tmp_path / "calls.txt").write_text("app,func,end_timestamp,duration\nx,f,5,1\nbroken\n")
    (tmp_path / "lengths.csv").write_text("prompt_tokens,output_tokens\n8,9\n")
    own = [
        "--maf2",
        str(tmp_path / "calls.txt"),
        "--lengths-csv",
        str(tmp_path / "lengths.csv"),
        "--adapter-name",
        "m{}",
    ]
    assert "txt:3:" in str(write(tmp_path / "b.csv", *own).exception)
    shown = write(tmp_path / "b.csv", *own, "--skip-bad-rows", "--correlated")
    assert shown.exit_code == 0 and "skipped: " in shown.stderr and "txt:3:" in shown.stderr
    assert files.read(tmp_path / "b.csv").adapters == ["m0"]
    assert files.read(tmp_path / "b.csv").source["skipped_by_file"] == {"calls.txt": 1}
    (tmp_path / "lengths.csv").write_text("prompt_tokens,output_tokens\n8,9\neight,9\n8\n")
    for options, trace in ((own, {"calls.txt": 1}), (["--popularity", "zipf", *own[2:4]], {})):
        assert write(tmp_path / "d.csv", *options, "--skip-bad-rows").exit_code == 0
        source = files.read(tmp_path / "d.csv").source
        assert source["skipped_by_file"] == {**trace, "lengths.csv": 2}
        assert source["skipped_rows"] == 2 + len(trace)
    assert write(tmp_path / "c.csv", "--popularity", "zipf", "--zipf", "3").exit_code == 0
    assert "Zipf (3)" in files.read(tmp_path / "c.csv").source["arrivals"]
    assert write(tmp_path / "c.csv", "--popularity", "uniform").exit_code == 0


@pytest.mark.parametrize("popularity", ["uniform", "zipf", "trace"])
def test_adapters_can_be_named_one_by_one(tmp_path: Path, popularity: str) -> None:
    options = ["--rate", "5", "--requests", "60", "--adapter-name", "sql,json", "--popularity", popularity]
    shown = CliRunner().invoke(cli.app, ["workload", "write", str(tmp_path / "a.jsonl"), *options])
    assert shown.exit_code == 0, shown.exception
    assert set(files.read(tmp_path / "a.jsonl").adapters) == {"sql", "json"}
    # A comma in a pattern is part of the names.
    assert write(tmp_path / "b.jsonl", "--adapter-name", "a,{}").exit_code == 0
    assert set(files.read(tmp_path / "b.jsonl").adapters) <= {f"a,{i}" for i in range(4)}


def test_sharegpt_with_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"w": 0, "?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    entry = {"conversations": [{"value": "w " * 6}, {"value": "w " * 7}]}
    (tmp_path / "sharegpt.json").write_text(json.dumps([entry]))
    options = ["--sharegpt", str(tmp_path / "sharegpt.json"), "--tokenizer", str(tmp_path), "--ratio", "2"]
    assert write(tmp_path / "a.csv", *options).exit_code == 0
    assert {(a.prompt_tokens, a.output_tokens) for a in files.read(tmp_path / "a.csv").arrivals} == {(6, 20)}


def test_describing_with_a_picture(tmp_path: Path) -> None:
    write(tmp_path / "a.csv")
    shown = CliRunner().invoke(
        cli.app, ["workload", "describe", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.svg")]
    )
    assert shown.exit_code == 0 and "60 requests" in shown.output and (tmp_path / "a.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--popularity", "bimodal"], "trace, uniform or zipf"),
        (["--popularity", "zipf", "--maf1", "x"], "for --popularity trace"),
        (["--maf1", "x", "--maf2", "y"], "give one"),
        (["--adapter-name", "same"], "put {} where"),
        (["--adapter-name", "sql,json"], "has 2 names, not 4: leave --adapters out"),
        (["--adapter-name", "sql,json,sql,x"], "or one twice"),
        (["--adapter-name", "sql,json,,x"], "an empty name"),
        (["--lengths-csv", "x", "--fixed-lengths", "1,2"], "exclude each other"),
        (["--fixed-lengths", "1"], "128,64"),
        (["--lengths", "alpaca"], "sharegpt"),
        (["--sharegpt", "x"], "--tokenizer"),
        (["--sharegpt", "x", "--tokenizer", "."], "cannot be loaded"),
        (["--window", "0-1"], "DAY.HOUR.MINUTE"),
        (["--cv", "0"], "cv"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: list[str], message: str) -> None:
    refused = write(tmp_path / "a.csv", *options).exception
    assert isinstance(refused, ConfigError) and message in str(refused)
    assert not (tmp_path / "a.csv").exists()
