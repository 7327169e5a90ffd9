"""``peft-dist simulate``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peft_dist.cli import app
from peft_dist.cli_generate import WorkloadOptions
from peft_dist.cli_simulate import simulate
from peft_dist.cli_workload import write
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


def test_it_generates_by_every_option_of_workload_write(tmp_path: Path) -> None:
    """The very requests that a file of these options has."""
    (tmp_path / "lengths.csv").write_text("prompt_tokens,output_tokens\n40,9\n700,90\nbroken\n50,5\n")
    calls = "\n".join(f"app{index % 3},f,{45.0 * index},1.0" for index in range(40))
    (tmp_path / "calls.txt").write_text(f"app,func,end_timestamp,duration\n{calls}\n")
    asked = ["--rate", "4", "--requests", "12", "--adapters", "3", "--adapter-name", "m{}", "--skip-bad-rows"]
    asked += ["--maf2", str(tmp_path / "calls.txt"), "--window", "0.0.0-0.0.30", "--interval", "10", "--correlated"]
    asked += [
        "--lengths-csv",
        str(tmp_path / "lengths.csv"),
        "--max-total",
        "300",
        "--max-prompt",
        "45",
        "--ratio",
        "2",
    ]
    written = ["workload", "write", str(tmp_path / "load.jsonl"), *asked]
    CliRunner().invoke(app, written, catch_exceptions=False)
    for name, options in (("a", asked), ("b", [str(tmp_path / "load.jsonl")])):
        call(*options, "--replicas", "2", "--output", str(tmp_path / name))
    own, of_file = (records.read_json(tmp_path / name) for name in "ab")
    assert own.records == of_file.records and {one.adapter for one in own.records} == {"m0", "m1", "m2"}
    assert {(one.prompt_tokens, one.output_tokens) for one in own.records} == {(40, 58)}
    source = own.source["workload"]
    assert source == of_file.source["workload"] and source["intervals"] == 3
    assert "correlated" in source["streams"] and "1 bad rows skipped, 1 of 3 pass" in source["lengths"]


def test_the_bound_on_being_overtaken_can_be_chosen(tmp_path: Path) -> None:
    """In overload it ends merged periods again and again, and everybody waits for longer."""
    hot = ["--rate", "12", "--requests", "300", "--adapters", "6", "--popularity", "zipf", "--zipf", "2.5"]
    merged, waited = [], []
    for bound in ("1", "inf"):
        call(*hot, "--max-adapter-wait", bound, "--output", str(tmp_path / bound))
        run = records.read_json(tmp_path / bound)
        assert float(run.source["options"]["max_adapter_wait"]) == float(bound)
        merged.append(sum(replica["merged_steps"] for replica in run.source["found"]["replicas"]))
        waited.append(sum(one.queueing or 0.0 for one in run.records))
    assert merged[0] < merged[1] and waited[0] > waited[1]


def test_what_an_execution_type_decides_is_told(tmp_path: Path) -> None:
    for kind, profile in (("vllm-artifact", "artifact"), ("vllm", "default")):
        told = call(*SMALL, "--exec-type", kind, "--output", str(tmp_path / kind))
        options = records.read_json(tmp_path / kind).source["options"]
        names = ("migration", "policy_profile", "max_adapter_wait", "merge")
        assert tuple(options[name] for name in names) == ("rr", profile, "inf", "auto") and options["policy"] == "merge"
        assert f"exec type {kind}, policy merge, migration rr" in told
    assert "exec type dlora, policy credit, migration dlora" in call(*SMALL)


def test_a_workload_without_requests_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("time,adapter,prompt_tokens,output_tokens\n")
    with pytest.raises(ConfigError, match=r"none\.csv has no requests"):
        call(str(tmp_path / "none.csv"))


def test_requests_may_be_longer_than_a_profile_has_them() -> None:
    assert ", 0 failed" in call(*SMALL, "--fixed-lengths", "2000,49", "--max-model-len", "2049")


@pytest.mark.parametrize("command", ["write", "simulate"])
def test_workload_options_are_those_of_workload_write(command: str) -> None:
    """Each in both commands, with the same default."""
    given = inspect.signature(simulate if command == "simulate" else write).parameters
    for option in dataclasses.fields(WorkloadOptions):
        required = option.default is dataclasses.MISSING
        wanted = (None if command == "simulate" else inspect.Parameter.empty) if required else option.default
        assert given[option.name].default == wanted, option.name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--rate and --requests"),
        (["load.jsonl", "--rate", "1"], "leave out --rate"),
        (["load.jsonl", "--cv", "3", "--lengths-csv", "x"], "leave out --cv, --lengths-csv, or the file"),
        ([*SMALL, "--lengths-csv", "/nowhere.csv"], "/nowhere.csv"),
        ([*SMALL, "--sharegpt", "x"], "name the model's --tokenizer"),
        ([*SMALL, "--profile", "mine"], "no profile 'mine'"),
        ([*SMALL, "--exec-type", "slora"], "exec_type='slora'"),
        ([*SMALL, "--fixed-lengths", "2000,49"], r"2049 tokens.*'paper-7b' takes 2048.*raise --max-model-len"),
        (
            [*SMALL, "--exec-type", "vllm", "--policy", "fcfs"],
            "policy='fcfs' is not used: exec_type='vllm' takes",
        ),
        ([*SMALL, "--exec-type", "vllm", "--migration", "proactive"], r"migration='proactive'.* takes 'rr'"),
        ([*SMALL, "--exec-type", "peft", "--max-adapter-wait", "3"], r"max_adapter_wait=3\.0 is not used.* takes inf"),
        ([*SMALL, "--exec-type", "peft", "--policy-profile", "artifact"], "simulate another execution type"),
        ([*SMALL, "--plan", "cbc"], "plan='cbc'"),
        ([*SMALL, "--policy", "lifo"], "policy='lifo'"),
        ([*SMALL, "--output", "/nowhere/run.json"], "no folder /nowhere"),
        ([*SMALL, "--csv", "/tmp"], "/tmp could not be written after the run: name a file"),
    ],
)
def test_what_cannot_be_is_refused_before_it_runs(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call(*options)
