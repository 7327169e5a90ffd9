"""Each figure's script in its smallest form: columns, the same bytes twice, and figures of a live server."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pytest
import torch
from experiments import (
    authors,
    experiment,
    fig05_operators,
    fig10_policies,
    fig12_adapters,
    here,
    live,
    points,
    tables,
)
from experiments.loads import Data, LoadSpec, make
from experiments.measured import Work, measure
from experiments.settings import Settings
from experiments.systems import SYSTEMS, chosen

import peft_dist
from peft_dist.core.errors import ConfigError
from peft_dist.workload.records import RequestRecord
from tests.e2e.test_serve import adapter, serving

SCRIPTS = Path(__file__).parents[2] / "scripts" / "experiments"
# By script: its options, its CSV and the artifact's columns, and its pictures.
FIGURES = {
    "fig02b_queueing": ("--systems vllm-artifact,dlora", "fig2b", "replica_id,queueing_ratio", ["figure2"]),
    "fig07_trace": ("--days 1", "fig7", "day,relative", ["figure7"]),
    "fig09_end_to_end": (
        "--systems peft-artifact,dlora --panels maf2_70b",
        "fig9_maf2_70b",
        "exec_type,rate,avg_lat",
        ["figure9"],
    ),
    "fig10_policies": (
        "--systems fcfs,dlora-artifact",
        "fig10",
        "policy,stride,avg_lat,p90_lat",
        ["figure10a", "figure10b"],
    ),
    "fig11a_migration": (
        "--systems dlora",
        "fig11a",
        "migration_type,rate,queueing_delay,adjust_time,solver_time,tot_time",
        ["figure11a"],
    ),
    "fig11b_lengths": ("--systems proactive", "fig11b", "migration_type,ratio,avg_lat", ["figure11b"]),
    "fig12_adapters": ("--systems vllm,grouped", "fig12", "exec_type,num_models,throughput", ["figure12"]),
}


def run(monkeypatch: pytest.MonkeyPatch, script: str, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *options])
    runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("script", FIGURES)
def test_a_figure_is_the_same_twice(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, name, columns, pictures = FIGURES[script]
    for folder in ("a", "b"):
        common = ("--scale", "tiny", "--jobs", "1", "--seed", "3", "--output", str(tmp_path / folder))
        run(monkeypatch, script, *options.split(), *common)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    kinds = {f"{picture}.{kind}" for picture in pictures for kind in ("pdf", "png")}
    assert kinds | {f"{name}.csv", f"{name}.json"} == set(contents(tmp_path / "a"))
    lines = (tmp_path / "a" / f"{name}.csv").read_text().splitlines()
    assert lines[0].startswith(columns + ",") and lines[0].endswith("units") and len(lines) > 1
    about = json.loads((tmp_path / "a" / f"{name}.json").read_text())
    assert about["mode"] in ("simulated", "trace") and "synthetic" in json.dumps(about["data"])
    assert about["seed"] == 3 and about["versions"]["scipy"]
    if about["mode"] == "simulated":
        assert about["profiles"][0]["source"].startswith("dLoRA")
        assert set(about["systems"]) == set(options.split()[1].split(","))


def test_other_processes_and_hash_seeds_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--scale", "tiny", "--systems", "kv"]
    run(monkeypatch, "fig11a_migration", *options, "--jobs", "1", "--output", str(tmp_path / "a"))
    command = [sys.executable, str(SCRIPTS / "fig11a_migration.py"), *options, "--jobs", "2"]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([*command, "--output", str(tmp_path / "b")], env=environment, check=True, capture_output=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_breakdown_is_drawn_from_figure_11a(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of dLoRA in both forms and of the modern systems, in this order."""
    common = {"tot_time": 200.0, "mode": "simulated"}
    rows = [
        {"system": "grouped", "rate": 8, "adjust_time": 0.0, "solver_time": 0.0, **common},
        {"system": "dlora", "rate": 12, "adjust_time": 3.0, "solver_time": 1.0, **common},
        {"system": "dlora", "rate": 8, "adjust_time": 2.0, "solver_time": 0.5, **common},
        {"system": "rr", "rate": 8, "adjust_time": 9.0, "solver_time": 0.0, **common},
        {"system": "dlora-artifact", "rate": 8, "adjust_time": 4.0, "solver_time": 2.0, **common},
        {"system": "corrected", "rate": 8, "adjust_time": 1.0, "solver_time": 1.0, **common},
    ]
    tables.write_csv(tmp_path / "fig11a.csv", ["rate"], rows)
    kept = {"rate_factor": 0.5, "max_total": 512, "correlated": True, "versions": {"numpy": "2"}}
    tables.write_json(tmp_path / "fig11a.json", {"scale": "tiny", "seed": 3, "loads": [], **kept,
        "systems": {"dlora": {"options": {"plan_seconds": 0.2}}}})  # fmt: skip
    run(monkeypatch, "fig13_breakdown", "--output", str(tmp_path))
    assert (tmp_path / "fig13.csv").read_text().startswith("rate,solver,switching,inference,system,form,mode,units\n")
    names = ("system", "form", "rate", "switching", "solver", "inference")
    assert [tuple(row[name] for name in names) for row in tables.read_csv(tmp_path / "fig13.csv")] == [
        ("dlora-artifact", "artifact", 8, 2.0, 1.0, 97.0),
        ("dlora", "fair", 8, 1.0, 0.25, 98.75),
        ("dlora", "fair", 12, 1.5, 0.5, 98.0),
        ("corrected", "modern", 8, 0.5, 0.5, 99.0),
        ("grouped", "modern", 8, 0.0, 0.0, 100.0),
    ]
    assert (tmp_path / "figure13.pdf").exists()
    about = tables.read_json(tmp_path / "fig13.json")
    assert (about["mode"], about["scale"], about["seed"]) == ("simulated", "tiny", 3)
    assert about["assumed_plan_seconds"] == 0.2 and kept.items() <= about.items()
    with pytest.raises(SystemExit, match=r"run fig11a_migration\.py first"):
        run(monkeypatch, "fig13_breakdown", "--output", str(tmp_path / "empty"))


def test_operators_are_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = ["--reps", "20", "--warm-up", "2", "--size", "256", "--device", "cpu"]
    run(monkeypatch, "fig05_operators", *numbers, "--output", str(tmp_path))
    rows = tables.read_csv(tmp_path / "fig5.csv")
    assert (tmp_path / "fig5.csv").read_text().startswith("batch,Wx,BAx,grouped_one,grouped_each,mode,units\n")
    assert [row["batch"] for row in rows] == list(range(2, 17, 2)) and {row["mode"] for row in rows} == {"measured"}
    assert all(row[name] > 0 for row in rows for name in ("Wx", "BAx", "grouped_one", "grouped_each"))
    about = json.loads((tmp_path / "fig5.json").read_text())
    assert about["mode"] == "measured" and about["device"] == "cpu" and about["environment"]["torch"]
    assert about["units"]["grouped_each"] == "us" and (tmp_path / "figure5.pdf").exists()
    run(monkeypatch, "fig05_operators", *numbers, "--name", "fig5_small", "--output", str(tmp_path))
    assert (tmp_path / "fig5_small.csv").exists() and (tmp_path / "figure5_small.png").exists()


def test_what_is_measured_of_the_grouped_kernel_is_the_pairs_product() -> None:
    """Of the first adapter for all rows, and of each row's own."""
    matrices = fig05_operators.Matrices("cpu", 64, 4, 6)
    x, y, operators = matrices.operators(6)
    operators["grouped_one"]()
    torch.testing.assert_close(y, operators["BAx"]())
    y.zero_()
    operators["grouped_each"]()
    each = [row @ down.T @ up.T for row, (down, up) in zip(x, matrices.pairs, strict=True)]
    torch.testing.assert_close(y, torch.stack(each))


@pytest.mark.slow
def test_a_live_server_gives_its_systems_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of one system replace those of that system, and stand beside the others'. What the server's
    orchestrator decided meanwhile is decided again from its recording (its replicas have no engines). Of a late client
    nothing is kept."""
    (tmp_path / "recorded").mkdir()
    monkeypatch.setenv("PEFT_DIST_RECORD", str(tmp_path / "recorded"))
    options = ["--replicas", "2", "--served-model-name", "tiny"]
    for number in (10, 9, *range(8)):
        options += ["--adapter", f"adapter{number}={adapter(tmp_path / f'adapter{number}', f'{number}')}"]
    asked = ["--scale", "tiny", "--rate-factor", "40", "--max-total", "40", "--end-id", "900"]
    # Rows are looked at, not figures: on a busy machine the client may be late.
    asked += ["--max-lateness", "60", "--output", str(tmp_path / "out")]
    with serving(tmp_path, *options) as server:
        assert live.adapters_of(server.url) == [f"adapter{number}" for number in (*range(8), 9, 10)]
        for system in ("fcfs", "dlora", "dlora"):
            run(monkeypatch, "fig10_policies", "--server", server.url, "--systems", system, *asked)
        run(monkeypatch, "fig02b_queueing", "--server", server.url, "--systems", "vllm", *asked)
        with pytest.raises(SystemExit):
            late = [*asked, "--max-lateness", "1e-9"]
            run(monkeypatch, "fig10_policies", "--server", server.url, "--systems", "fcfs", *late)
    assert "the client fell behind" in capsys.readouterr().err
    recordings = sorted((tmp_path / "recorded").iterdir())
    assert [path.name.partition("-")[0] for path in recordings] == ["orchestrator"]
    replay = [sys.executable, str(SCRIPTS.parent / "replay.py"), *map(str, recordings)]
    told = subprocess.run(replay, check=True, capture_output=True, text=True).stdout
    assert "alike" in told and " 0 requests" not in told, told
    rows = tables.read_csv(tmp_path / "out" / "fig10.csv")
    assert [(row["policy"], row["mode"], row["replicas"], row["failed"]) for row in rows] == [
        ("fcfs", "live", 2, 0),
        ("credit", "live", 2, 0),
    ]
    assert all(row["avg_lat"] > 0 for row in rows)
    assert [row["replica_id"] for row in tables.read_csv(tmp_path / "out" / "fig2b.csv")] == [0, 1]
    about = json.loads((tmp_path / "out" / "fig10.json").read_text())
    assert about["mode"] == "live" and set(about["servers"]) == {"fcfs", "dlora"}
    assert about["servers"]["fcfs"]["max_lateness"] == 60
    assert {row["model"] for row in rows} == {about["servers"]["fcfs"]["model"]} == {"worker"}
    assert about["servers"]["fcfs"]["versions"]["server"] == peft_dist.__version__
    assert about["servers"]["fcfs"]["client"]["cpu"] and about["servers"]["fcfs"]["server"].startswith("http")


def test_simulated_and_live_rows_do_not_replace_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything run before that is said."""
    known = [{"system": "fcfs", "mode": "live", "policy": "fcfs", "stride": 4, "avg_lat": 1.0, "p90_lat": 2.0}]
    tables.write_csv(tmp_path / "fig10.csv", ["policy"], known)
    monkeypatch.setattr(points, "run", lambda *_: pytest.fail("it was run"))
    for _ in range(2):
        mode, other = known[0]["mode"], "simulated" if known[0]["mode"] == "live" else "live"
        server = live.Server("http://nowhere") if other == "live" else None
        with pytest.raises(ConfigError, match=rf"fig10\.csv is {mode}, this is to be {other}: give another --output"):
            experiment.run(fig10_policies.EXPERIMENT, Settings(tmp_path, "tiny", server=server, systems=("fcfs",)))
        assert tables.read_csv(tmp_path / "fig10.csv") == known
        known = [{**known[0], "mode": "simulated"}]
        tables.write_csv(tmp_path / "fig10.csv", ["policy"], known)


def test_live_runs_are_told_apart_by_what_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Figure 12 each number of adapters is another server, and each is told of."""
    measured = measure([RequestRecord(0, "a", 0.0, 0.0, 1.0, 2.0, 10, 4)], Work(0.0, 0.0))
    monkeypatch.setattr(
        points, "run", lambda ladders, *_: [(point, measured) for ladder in ladders for point in ladder]
    )
    served = {"model": "tiny", "device": "a CPU", "replicas": 8, "versions": {"server": "1"}}
    for adapters in (16, 32):
        server = live.Server(f"http://nowhere:{adapters}")
        chosen_ = Settings(tmp_path, "paper", server=server, systems=("dlora",), seed=1, served=served)
        [made] = fig12_adapters.experiments(argparse.Namespace(adapters=adapters))
        experiment.run(made, chosen_)
    about = json.loads((tmp_path / "fig12.json").read_text())
    told = {name: (own["server"], own["seed"]) for name, own in about["servers"].items()}
    assert told == {
        "dlora, num_models 16": ("http://nowhere:16", 1),
        "dlora, num_models 32": ("http://nowhere:32", 1),
    }
    rows = tables.read_csv(tmp_path / "fig12.csv")
    assert [(row["num_models"], row["model"]) for row in rows] == [(16, "tiny"), (32, "tiny")]
    assert all(served.items() <= own.items() for own in about["servers"].values())
    assert all("bring their KV" in row["live_differs"] for row in rows)
    assert about["versions"]["matplotlib"] == matplotlib.__version__


def test_what_no_live_server_is_cannot_be_measured() -> None:
    with pytest.raises(SystemExit, match="not merged and unmerged in every step"):
        here.options_of(SYSTEMS["peft-artifact"])
    assert all(one.live for one in SYSTEMS.values() if one.form == "artifact")
    assert not SYSTEMS["peft"].live and not SYSTEMS["proactive"].live


@pytest.mark.parametrize("answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort"])
def test_a_server_that_breaks_off_is_named(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or says nothing in time; of counts since its start none is taken for one of a run."""
    monkeypatch.setattr(live, "TIMEOUT", 5.0 if answer else 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def serve() -> None:
            for _ in range(3):
                connection, _address = listening.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(answer)
                    if not answer:
                        connection.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        for ask, words in (
            (live.fetch, "cannot be read"),
            (live.adapters_of, "its models"),
            (live.replicas_of, "it is"),
        ):
            with pytest.raises(ConfigError, match=words):
                ask(url)
        thread.join()


def test_waits_are_told_by_who_is_there() -> None:
    before = live.read('peft_dist:switch_seconds_total{replica="0"} 1.5\npeft_dist:switches_total{replica="0"} 3\n')
    text = (
        'peft_dist:switch_seconds_total{replica="0"} 2.0\npeft_dist:switch_seconds_total{replica="1"} 0.75\n'
        'peft_dist:switches_total{replica="0"} 5\npeft_dist:migration_moves_total{way="kv"} 4\n'
        "peft_dist:migration_plan_seconds_total 0.25\n"
    )
    looks = live.Looks("http://nowhere")
    for waiting in (3, 1):
        looks.note(
            live.read(
                f'peft_dist:requests_waiting{{replica="0"}} {waiting}\npeft_dist:requests_running{{replica="0"}} 6\n'
                'peft_dist:requests_waiting{replica="1"} 0\npeft_dist:requests_running{replica="1"} 2\n'
            )
        )
    work = live.work(before, live.read(text), looks)
    assert work == Work(0.75, 0.25, (0.25, 0.0), switches=2, moved_with_kv=4)


def test_figures_of_records() -> None:
    records = [
        RequestRecord(0, "a", 0.0, 0.0, 1.0, 2.0, 10, 4, queueing=0.4),
        RequestRecord(1, "a", 1.0, 1.0, 2.0, 5.0, 10, 4, queueing=0.8),
        RequestRecord(2, "a", 1.0, 1.0, None, 9.0, 10, 0, error="lost"),
    ]
    found = measure(records, Work(0.0, 0.0))
    assert (found.avg_lat, found.requests, found.failed) == (0.75, 3, 1)
    assert found.queueing_delay == pytest.approx(0.15) and found.slo_attainment == pytest.approx(1 / 3)
    assert found.throughput == pytest.approx(2 / 9) and found.tot_time == 9.0


def test_a_smaller_cluster_has_its_part_of_the_load(tmp_path: Path) -> None:
    load = LoadSpec("maf1", "0.0.0-0.2.0", 64.0, 6400, 128)
    point = Settings(tmp_path, "small").point(SYSTEMS["dlora"], "7b", 32, load)
    assert (point.replicas, point.load.rate, point.load.adapters, point.load.requests) == (8, 16.0, 32, 480)
    assert Settings(tmp_path, "paper").point(SYSTEMS["dlora"], "7b", 32, load).load == load
    assert Settings(tmp_path, "small").some((1, 2, 3, 4, 5)) == [1, 3, 5]


def test_data_is_looked_for_where_it_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is none of maf1, maf2"):
        Data.found(tmp_path)
    (tmp_path / "lengths.csv").write_text("prompt_tokens,output_tokens\n7,5\n9,0\n8,6\n")
    (tmp_path / "maf2").mkdir()
    calls = "\n".join(f"app{index % 3},f,{60.0 * index},1.0" for index in range(12))
    trace = tmp_path / "maf2" / "AzureFunctionsInvocationTraceForTwoWeeksJan2021.txt"
    trace.write_text(f"app,func,end_timestamp,duration\n{calls}\n")
    data = Data.found(tmp_path)
    assert data.source == {"maf1": "synthetic", "maf2": "maf2", "lengths": "lengths.csv"}
    assert Data().source["maf2"] == "synthetic (fitted to 2019's)"
    made = make(LoadSpec("maf2", "0.0.0-0.6.0", 2.0, 9, 3), data)
    assert {arrival.prompt_tokens for arrival in made.arrivals} <= {7, 8} and len(made.arrivals) == 9
    # Texts need counting only where lengths are asked for.
    with pytest.raises(ConfigError, match="name the model's --tokenizer"):
        make(LoadSpec("maf2", "0.0.0-0.6.0", 2.0, 9, 3), Data(sharegpt=tmp_path / "x.json"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--systems", "nobody"], "does not show the system 'nobody'"),
        (["--server", "http://127.0.0.1:9"], "--server needs --systems with one name"),
        (["--server", "http://127.0.0.1:9", "--systems", "fcfs"], "does not tell its models"),
        (["--server", "http://127.0.0.1:9", "--systems", "peft-artifact"], "a live server is no 'peft-artifact'"),
        (["--data", "/nowhere/at/all"], "there is none of"),
        (["--maf1", "/nowhere/d01.csv"], "--maf1 /nowhere/d01.csv: there is no such file"),
        (["--server-told", "{}"], "--server-told tells of --server: name that too"),
        (["--jobs", "0"], "--jobs 0: it must be 1 process or more"),
        (["--output", "/dev/null/figures", "--scale", "tiny"], "--output /dev/null/figures cannot be written"),
        (["--plot", "--output", "/nowhere/at/all"], "there is no fig10.csv in /nowhere/at/all"),
    ],
)
def test_what_cannot_be_is_said(
    options: Sequence[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "fig10_policies", *options)
    assert ended.value.code == 1 and words in capsys.readouterr().err


def test_systems_and_curves() -> None:
    assert [one.name for one in chosen(["fcfs", "merge"], [])] == ["fcfs", "merge"]
    # As read off by hand from the authors' notebook.
    found = [authors.rate_at(curve, 0.5) for curve in authors.FIGURE9.values()]
    assert found == pytest.approx([7.61, 5.38, 61.78], abs=0.01)
    assert authors.rate_at({1: 0.6, 2: 0.9}, 0.5) is None and authors.rate_at({1: 0.1, 2: 0.2}, 0.5) is None


def test_the_result_keeps_what_was_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.write_json(tmp_path / "experiments.json", {"fig5": {"rows": []}, "fig7": {"rows": []}})
    tables.write_csv(tmp_path / "fig7.csv", ["day", "relative"], [{"day": 0, "relative": 0.51239}])
    run(monkeypatch, "report", "--figures", str(tmp_path), "--output", str(tmp_path))
    result = tables.read_json(tmp_path / "experiments.json")
    assert list(result) == ["fig5", "fig7"] and result["fig7"]["rows"] == [{"day": 0, "relative": 0.5124}]
