"""The load and the settings of bench_balance.py, its way to the simulator, and all of it on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bench import bench_balance
from bench.balance_load import Load, Offered, Results
from bench.balance_report import table
from bench.balance_settings import of_result, to_keep
from bench.balance_simulated import as_table, counted, simulated
from bench.balance_trace import TraceLoad
from experiments.loads import Data

from peft_dist.workload.records import RequestRecord

SCRIPT = Path(bench_balance.__file__)
NAMES = [f"adapter{index}" for index in range(8)]


@pytest.mark.parametrize("load", [Load(NAMES, 1.0, 3.0, 64), TraceLoad(NAMES, 128, Data())], ids=["skew", "trace"])
def test_the_same_arrivals_are_made_twice(load: Offered) -> None:
    planned = load.over_time(10.0, 20.0, 3)
    assert planned == load.over_time(10.0, 20.0, 3) != load.over_time(10.0, 20.0, 4)
    assert 100 < len(planned) < 400 and {one.adapter for one in planned} <= set(NAMES)
    assert all(earlier.at <= later.at for earlier, later in pairwise(planned))
    burst = load.even(16, 0)
    assert [one.adapter for one in burst] == NAMES * 2 and {one.at for one in burst} == {0.0}


def test_a_trace_has_its_own_lengths_up_to_the_bound_and_ids_below_the_end() -> None:
    load = TraceLoad(NAMES, 128, Data(), end_id=1100)
    planned = load.over_time(20.0, 20.0, 0)
    totals = [len(one.prompt) + one.tokens for one in [*planned, *load.even(100, 0)]]
    assert len(planned) == 400 and 100 < max(totals) <= 128
    assert all(1000 <= token < 1100 for one in planned for token in one.prompt)
    assert len({one.tokens for one in load.even(100, 0)}) > 20
    counts = [sum(one.adapter == name for one in planned) for name in NAMES]
    assert counts[0] == max(counts) > 2 * min(counts), "the first adapter has the most popular function"


def test_settings_are_read_back_and_other_data_refused() -> None:
    given = ["--trace", "--loads", "0.5", "1", "--set", "num_blocks=64", "--max-loras", "4", "--rate", "3.25"]
    options = bench_balance.parser().parse_args([*given, "--data", "somewhere"])
    kept = json.loads(json.dumps(to_keep(options, Data())))
    read = of_result(kept, bench_balance.parser(), Data())
    assert (read.loads, read.set, read.max_loras, read.rate) == ([0.5, 1.0], ["num_blocks=64"], 4, 3.25)
    assert read.trace and read.data is None, "where data lie is another place on each machine"
    with pytest.raises(SystemExit, match="give the same --data"):
        of_result(kept, bench_balance.parser(), Data(lengths=Path("lengths.csv")))
    # As they were written once.
    old = {"loads": "[0.6, 0.8]", "max_loras": "16", "shape": "8b", "rate": "None", "skew": "1.5", "set": "[]"}
    read = of_result(old, bench_balance.parser(), Data())
    assert (read.loads, read.max_loras, read.shape, read.rate) == ([0.6, 0.8], 16, "8b", None)
    assert (read.skew, read.set, read.replicas, read.trace) == (1.5, [], 2, False)


def test_simulated_requests_are_counted_as_live_ones() -> None:
    records = [
        RequestRecord(0, "a", 1.0, 1.0, 1.5, 2.0, prompt_tokens=4, output_tokens=2, itl=(0.5,)),
        RequestRecord(1, "a", 3.0, 3.0, 3.25, 5.0, prompt_tokens=4, output_tokens=4, itl=(0.25, 1.25, 0.25)),
    ]
    found = counted(records, 2.0, 6.0)
    assert found == Results([0.25], [0.5], [], [1.25], asked=1, tokens=4, seconds=4.0)
    told = found.summary(0.05)
    assert (told["requests"], told["lost"], told["queueing_mean_ms"], told["tokens_per_second"]) == (1, 0, 200.0, 1.0)
    assert Results([1.0], [1.0], [0.0], [0.0], asked=3, tokens=1, seconds=1.0).summary(0.0)["lost"] == 2


def test_a_result_is_simulated_run_by_run() -> None:
    options = bench_balance.parser().parse_args(
        ["--trace", "--max-total", "128", "--adapters", "8", "--max-loras", "4", "--seconds", "8", "--warm", "2"]
    )
    load = TraceLoad(NAMES, 128, Data())
    rate = 3.0
    live = {"queueing_mean_ms": 0.0, "mean_s_per_token": 0.05, "p90_s_per_token": 0.1}

    def run(kind: str, load_share: float, **more: Any) -> dict[str, Any]:
        planned = load.over_time(load_share * rate, 10.0, 0)
        counts = sum(one.at >= 2.0 for one in planned)
        return {"migration": kind, "load": load_share, "seed": 0, "requests": counts, **live, **more}

    runs = [run("rr", 0.5), run("dlora", 0.5), run("dlora", 1.0), run("dlora", 1.0, killed=1)]
    figures = {"requests_per_second_at_load_1": rate, "runs": runs}
    found = simulated(figures, options, "cpu-smollm2", Data())
    assert [(one["migration"], one["load"]) for one in found["runs"]] == [("rr", 0.5), ("dlora", 0.5), ("dlora", 1.0)]
    assert found["profile"]["name"] == "cpu-smollm2" and found["lone_first_token_ms"] > 28
    for one in found["runs"]:
        ratio = one["simulated_over_live"]
        assert ratio["queueing_mean_ms"] is None, "nothing queued live"
        assert ratio["mean_s_per_token"] == pytest.approx(one["simulated"]["mean_s_per_token"] / 0.05, abs=1e-3)
    assert found["runs"][1]["simulated"]["mean_s_per_token"] < found["runs"][2]["simulated"]["mean_s_per_token"]
    assert len(as_table(found["runs"]).splitlines()) == 5
    assert simulated(figures, options, "cpu-smollm2", Data()) == found
    runs[0]["requests"] += 1
    with pytest.raises(SystemExit, match="not those that it was measured with"):
        simulated(figures, options, "cpu-smollm2", Data())


@pytest.mark.slow
def test_tiny_replicas_are_measured_and_simulated(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False, timeout=240
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    tiny = ["--shape", "tiny", "--set", 'device="cpu"', 'dtype="float32"', "num_blocks=512", "max_model_len=512"]
    load = ["--trace", "--max-total", "96", "--end-id", "1500", "--rate", "4", "--burst", "12", "--max-num-seqs", "4"]
    more = ["--adapters", "4", "--max-loras", "2", "--kinds", "dlora", "--loads", "1", "--seconds", "4", "--warm", "1"]
    run(*tiny, *load, *more, "--kill", "--output", str(tmp_path))
    result = tmp_path / "balance.json"
    live, killed = json.loads(result.read_text())["figures"]["runs"]
    assert live["lost"] == killed["lost"] == 0 and "killed" not in live
    assert killed["killed"] == 1 and killed["requests_it_had"] >= 0
    assert live["requests"] > 5 and {"moved_with_kv", "moved_computed_again", "moved_bytes"} <= set(live)
    assert 0 <= live["merged_steps"] <= live["steps"] and live["steps"] > 5
    assert "| 1 | dlora |" in run("--simulate", str(result), "--profile", "cpu-smollm2")
    [told] = json.loads(result.read_text())["figures"]["simulated"]["runs"]
    assert told["simulated"]["requests"] == live["requests"] and told["live"]["requests"] == live["requests"]
    assert "dlora" in run("--plot", str(result)) and (tmp_path / "balance.svg").exists()


def test_the_table_tells_pace_and_moves() -> None:
    figures = {"queueing_mean_ms": 10.0, "queueing_p90_ms": 40.0, "mean_s_per_token": 0.02, "p90_s_per_token": 0.03}
    runs: list[dict[str, Any]] = [
        {"migration": "rr", "load": 0.6, "seed": 0, **figures},
        {"migration": "dlora", "load": 0.6, "seed": 0, "moved_with_kv": 2, "moved_computed_again": 1, **figures},
        {"migration": "dlora", "load": 0.8, "seed": 0, "moved_with_kv": 0, "moved_computed_again": 0, **figures},
        {"migration": "dlora", "load": 0.8, "seed": 1, "killed": 1, **figures},
    ]
    assert table(runs).splitlines()[2:] == [
        "| 0.6 | rr | 10, 40 | 20.0, 30.0 | not told |",
        "| 0.6 | dlora | 10, 40 | 20.0, 30.0 | 2, 1 |",
        "| 0.8 | dlora | 10, 40 | 20.0, 30.0 | 0, 0 |",
        "| 0.8, one killed | dlora | 10, 40 | 20.0, 30.0 | not told |",
    ]


def test_results_and_what_runs_printed_are_joined(tmp_path: Path) -> None:
    def run(kind: str, requests: int) -> dict[str, Any]:
        return {"migration": kind, "load": 0.5, "seed": 0, "requests": requests}

    def result(name: str, *runs: dict[str, Any]) -> Path:
        path = tmp_path / name
        path.write_text(
            json.dumps({"environment": {"cpu": "one"}, "figures": {"settings": {}, "runs": runs}}, indent=2)
        )
        return path

    printed = tmp_path / "printed.log"
    printed.write_text(f"proactive: 3.00 requests/s at once\n{json.dumps(run('proactive', 3))}\n")
    parts = [result("a.json", run("rr", 1)), result("b.json", run("rr", 9), run("dlora", 2)), printed]
    options = bench_balance.parser().parse_args(
        ["--join", *map(str, parts), "--output", str(tmp_path), "--name", "all"]
    )
    joined = json.loads(bench_balance.join(options).read_text())
    assert joined["environment"] == {"cpu": "one"}
    told = [(one["migration"], one["requests"]) for one in joined["figures"]["runs"]]
    assert told == [("rr", 1), ("dlora", 2), ("proactive", 3)]
    assert joined["figures"]["settings"] == {"kinds": ["rr", "dlora", "proactive"], "name": "all"}
