"""What experiments read and tell of traces and lengths: rows that cannot be read, files that end early, skew."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from experiments import experiment, fig07_trace, fig10_policies, loads, points, simulated
from experiments.loads import Data, LoadSpec
from experiments.settings import Settings, parser, settings

from peft_dist.core.errors import ConfigError
from peft_dist.sim.experiment import SimulationResult, simulate
from peft_dist.sim.options import SimulationOptions
from peft_dist.sim.profile import CostProfile
from peft_dist.workload.arrivals import Arrival

WINDOW = "0.0.0-0.6.0"
POINTS = ("--scale", "tiny", "--systems", "fcfs", "--jobs", "1")


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """30 calls of 3 functions, one of which has half of them, within half an hour; and a row that is none."""
    rows = [f"app{(0, 1, 0, 2)[index % 4]},f,{60.0 * index},1.0" for index in range(30)]
    file = tmp_path / "calls.txt"
    file.write_text("\n".join(["app,func,end_timestamp,duration", *rows, "app9,f,soon,1.0"]) + "\n")
    return file


def test_each_load_says_of_how_much_trace_it_is(
    calls: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that ends before its window, and adapters that nobody asks for, are told of."""
    data = Data(maf2=calls, skip_bad=True)
    chosen = Settings(tmp_path, "tiny", data, seed=1, systems=("fcfs", "grouped"))
    rows = experiment.run(fig10_policies.EXPERIMENT, chosen)
    told = capsys.readouterr().err
    assert told.count(f"skipped: {calls}:32: end_timestamp is 'soon'") == 1
    assert told.count("calls.txt ends before the window: the last call is in minute 29, the window ends at 360") == 1
    [load] = json.loads((tmp_path / "fig10.json").read_text())["loads"]
    source = load["workload"]["source"]
    assert {name: source[name] for name in ("functions", "calls", "skipped_rows", "intervals")} == {
        "functions": 3, "calls": 30, "skipped_rows": 1, "intervals": 1,
    }  # fmt: skip
    assert load["active_adapters"] == 1 and load["largest_share"] == 1.0
    assert all((row["active_adapters"], row["largest_share"]) == (1, 1.0) for row in rows)


def test_rows_that_cannot_be_read_end_an_experiment_unless_they_are_left_out(calls: Path, tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("prompt_tokens,output_tokens\n9,0\n9,9\nnine,9\n")
    spec = LoadSpec("maf2", WINDOW, 2.0, 9, 3)
    made = parser(None).parse_args(["--maf2", str(calls), "--lengths-csv", str(lengths)])
    with pytest.raises(ConfigError, match=r"calls\.txt:32: .*have bad rows skipped"):
        loads.make(spec, settings(made).data)
    with pytest.raises(ConfigError, match=r"lengths\.csv:4: prompt_tokens is 'nine'"):
        loads.make(spec, Data(lengths=lengths))
    made = parser(None).parse_args(["--maf2", str(calls), "--lengths-csv", str(lengths), "--skip-bad-rows"])
    source = loads.make(spec, settings(made).data).source
    assert source["skipped_by_file"] == {"calls.txt": 1, "lengths.csv": 1} and source["skipped_rows"] == 2
    assert "1 bad rows skipped" in str(source["lengths"])
    days = tmp_path / "day.csv"
    minutes = ",".join(map(str, range(1, 1441)))
    ones = ",".join(["1"] * 1440)
    days.write_text(f"HashOwner,HashApp,HashFunction,{minutes}\no,a,f,{ones}\no,a,g,x\n")
    with pytest.raises(ConfigError, match=r"day\.csv:3: "):
        fig07_trace.read(Data(maf1=days), 1, 0)
    assert fig07_trace.read(Data(maf1=days, skip_bad=True), 1, 0).bad.count == 1


def test_the_seed_is_the_clusters_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides which adapter the artifact's placement puts on all replicas."""
    seen = []

    def noted(arrivals: Sequence[Arrival], profile: CostProfile, options: SimulationOptions) -> SimulationResult:
        seen.append(options.seed)
        return simulate(arrivals, profile, options)

    monkeypatch.setattr(simulated, "simulate", noted)
    experiment.run(fig10_policies.EXPERIMENT, Settings(tmp_path, "tiny", seed=7, systems=("dlora-artifact",)))
    about = json.loads((tmp_path / "fig10.json").read_text())
    assert seen == [7] and about["systems"]["dlora-artifact"]["options"]["seed"] == 7


def test_files_are_read_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of ShareGPT take minutes to count."""
    counted = tmp_path / "counted"

    def counter(name: str) -> loads.lengths.CountTokens:
        def count(texts: list[str]) -> list[int]:
            counted.open("a").write("once\n")
            return [len(text) for text in texts]

        return count

    monkeypatch.setattr("peft_dist.cli_generate.token_counter", counter)
    file = tmp_path / "sharegpt.json"
    turns = [{"value": "a question of forty characters, or so ..."}, {"value": "an answer"}]
    file.write_text(json.dumps([{"conversations": turns}]))
    chosen = Settings(tmp_path, "tiny", Data(sharegpt=file, tokenizer="none"), systems=("fcfs", "merge"))
    ladders = fig10_policies.ladders(chosen)
    assert len(points.run(ladders, chosen.data, None, jobs=2)) == 2
    assert counted.read_text() == "once\n"
