"""Simulated systems one after another: their rows stand in one file, or are refused."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from experiments import beside, experiment, fig10_policies, fig12_adapters, live, points
from experiments.measured import Work, measure
from experiments.settings import Settings
from experiments.tables import Row, read_csv, read_json, write_json

from peft_dist.core.errors import ConfigError
from peft_dist.workload.records import RequestRecord


def run(folder: Path, *systems: str, seed: int = 3, scale: str = "tiny") -> None:
    experiment.run(fig10_policies.EXPERIMENT, Settings(folder, scale, seed=seed, systems=systems))


def test_systems_one_after_another_are_all_at_once(tmp_path: Path) -> None:
    for system in ("dlora", "fcfs", "dlora"):
        run(tmp_path / "turns", system)
    run(tmp_path / "once", "fcfs", "dlora")
    for name in ("fig10.csv", "fig10.json"):
        assert (tmp_path / "turns" / name).read_bytes() == (tmp_path / "once" / name).read_bytes()
    about = read_json(tmp_path / "once" / "fig10.json")
    assert list(about["systems"]) == ["fcfs", "dlora"] and len(about["loads"]) == len(about["profiles"]) == 1


def test_numbers_of_adapters_one_after_another(tmp_path: Path) -> None:
    """Of Figure 12, in the order of a run of all of them."""
    for adapters in (32, 16):
        [made] = fig12_adapters.experiments(argparse.Namespace(adapters=adapters))
        experiment.run(made, Settings(tmp_path, "tiny", systems=("grouped",)))
    rows = read_csv(tmp_path / "fig12.csv")
    assert [row["num_models"] for row in rows] == [4, 8] and len(read_json(tmp_path / "fig12.json")["loads"]) == 2


def test_rows_of_another_load_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor lost; whoever runs the same systems again has them replaced."""
    run(tmp_path, "fcfs")
    kept = read_csv(tmp_path / "fig10.csv")
    with monkeypatch.context() as patch:
        patch.setattr(points, "run", lambda *_: pytest.fail("it was run"))
        with pytest.raises(ConfigError, match=r"fig10\.csv has rows of fcfs .* their seed is 3, this run's is 4"):
            run(tmp_path, "dlora", seed=4)
        with pytest.raises(ConfigError, match="their scale is tiny, this run's is small"):
            run(tmp_path, "dlora", scale="small")
        slower = replace(Settings(tmp_path, "tiny", seed=3, systems=("dlora",)), rate_factor=0.5)
        with pytest.raises(ConfigError, match=r"their rate_factor is 1\.0, this run's is 0\.5"):
            experiment.run(fig10_policies.EXPERIMENT, slower)
        (tmp_path / "fig10.json").unlink()
        with pytest.raises(ConfigError, match="their scale is None, this run's is tiny"):
            run(tmp_path, "dlora")
    assert read_csv(tmp_path / "fig10.csv") == kept
    run(tmp_path, "fcfs", seed=4)
    assert len(read_csv(tmp_path / "fig10.csv")) == len(kept)


def test_rows_of_another_profile_or_other_rules_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One profile and one set of rules is told for all rows: those that stay would be told to be of the new ones."""
    run(tmp_path, "fcfs")
    kept, told = read_csv(tmp_path / "fig10.csv"), read_json(tmp_path / "fig10.json")
    monkeypatch.setattr(points, "run", lambda *_: pytest.fail("it was run"))

    def refused(words: str, about: dict[str, Any]) -> None:
        write_json(tmp_path / "fig10.json", about)
        with pytest.raises(ConfigError, match=words):
            run(tmp_path, "dlora")
        assert read_csv(tmp_path / "fig10.csv") == kept and read_json(tmp_path / "fig10.json") == about

    [profile] = told["profiles"]
    refused(
        r"of fcfs .* their profile paper-7b, costs, step is 0\.5, this run's is 0\.0.*Give another --output",
        {**told, "profiles": [{**profile, "costs": {**profile["costs"], "step": 0.5}}]},
    )
    old = {key: value for key, value in profile.items() if key != "decode_sizes"}
    refused("their profile paper-7b, decode_sizes is None", {**told, "profiles": [old]})
    rules = told["systems"]["fcfs"]
    refused(
        "their rules of fcfs, options, plan_seconds is 9, this run's is 0.2",
        {**told, "systems": {"fcfs": {**rules, "options": {**rules["options"], "plan_seconds": 9}}}},
    )
    refused("their rules of fcfs is None", {**told, "systems": {}})


SERVED = {"model": "tiny", "device": "a CPU", "replicas": 1, "versions": {"server": "1"}, "options": "--device cpu"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale": "small"}, "scale is tiny, this run's is small"),
        ({"seed": 4}, "seed is 3, this run's is 4"),
        ({"rate_factor": 5.0}, r"rate_factor is 1\.0, this run's is 5\.0"),
        ({"max_total": 512}, "max_total is None, this run's is 512"),
        ({"correlated": True}, "correlated is False"),
        ({"served": {**SERVED, "model": "large"}}, "model is tiny, this run's is large"),
        ({"served": {**SERVED, "device": "a GPU"}}, "device is a CPU, this run's is a GPU"),
        ({"served": {**SERVED, "versions": {"server": "2"}}}, "versions, server is 1, this run's is 2"),
        ({"served": {**SERVED, "options": ""}}, "options is --device cpu"),
    ],
)
def test_live_rows_of_other_servers_and_loads_are_not_mixed(
    changes: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = measure([RequestRecord(0, "a", 0.0, 0.0, 1.0, 2.0, 10, 4)], Work(0.0, 0.0))
    runs: list[str] = []

    def found(ladders: Sequence[points.Ladder], *_: object) -> points.Found:
        runs.append("once")
        return [(point, measured) for ladder in ladders for point in ladder]

    monkeypatch.setattr(points, "run", found)
    server = live.Server("http://nowhere")
    first = Settings(tmp_path, "tiny", seed=3, systems=("fcfs",), server=server, replicas=1, served=SERVED)
    experiment.run(fig10_policies.EXPERIMENT, first)
    kept = read_csv(tmp_path / "fig10.csv")
    with pytest.raises(ConfigError, match=rf"fig10\.csv has rows of fcfs .* their {words}.*Give another --output"):
        experiment.run(fig10_policies.EXPERIMENT, replace(first, systems=("dlora",), **changes))
    assert runs == ["once"] and read_csv(tmp_path / "fig10.csv") == kept
    # The same system again replaces its rows, whatever it is run with.
    experiment.run(fig10_policies.EXPERIMENT, replace(first, **changes))
    assert runs == ["once"] * 2 and {row["system"] for row in read_csv(tmp_path / "fig10.csv")} == {"fcfs"}


def test_live_rows_without_their_json_are_of_nobody_knows_what(tmp_path: Path) -> None:
    rows: list[Row] = [{"system": "fcfs", "num_models": 16}]
    with pytest.raises(ConfigError, match=r"rows of fcfs, num_models 16 .* their scale is None, this run's is tiny"):
        beside.check_live(tmp_path / "fig12.csv", rows, ("system", "num_models"), {}, {"scale": "tiny"})
