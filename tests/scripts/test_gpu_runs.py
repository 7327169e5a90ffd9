"""Runs of GPU benchmarks end in time, one on each device; the table of four GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench import bench_four_gpus, gpu_runs
from bench.gpu_checks import Lines
from bench.gpu_runs import Runs
from bench.gpu_workload import read_lines

from tests.scripts.test_bench_gpu import decode_line


def test_a_run_that_takes_too_long_ends_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runs, "LEAST_SECONDS", 0)
    script = tmp_path / "long.py"
    script.write_text(
        "import subprocess, sys\n"
        'print(\'{"part": "before"}\', flush=True)\n'
        "subprocess.run([sys.executable, '-c', 'import signal; signal.pause()'])\n"
    )
    runs = Runs({"long": [str(script)]})
    with (tmp_path / "lines").open("w") as lines:
        # The child holds our pipe open: the call only returns because it ended too.
        assert runs.run_all(["long"], 2.0, lines) == ["long"]
    assert [line["run"] for line in read_lines((tmp_path / "lines").read_text())] == ["long"]


def test_each_gpu_takes_the_next_run_when_it_is_free(tmp_path: Path) -> None:
    """The second run goes on until all others, which the other GPU has to take, are there."""
    script = tmp_path / "run.py"
    script.write_text(
        "import json, os, sys, time\n"
        "from pathlib import Path\n"
        "name, folder = sys.argv[1], Path(sys.argv[2])\n"
        "while name == 'b' and len(list(folder.iterdir())) < 3:\n"
        "    time.sleep(0.01)\n"
        "(folder / name).write_text('')\n"
        "print(json.dumps({'part': 'seen', 'device': os.environ['CUDA_VISIBLE_DEVICES']}))\n"
        "sys.exit(name == 'd')\n"
    )
    folder = tmp_path / "ended"
    folder.mkdir()
    commands = {name: [str(script), name, str(folder), "--discard"] for name in "abcd"}
    runs = Runs(commands, devices=["4", "7"])
    assert "--discard" not in runs.command("a") and "--discard" in Runs(commands).command("a")
    with (tmp_path / "lines").open("w") as lines:
        assert runs.run_all("abcd", None, lines) == ["d"]
    found = list(read_lines((tmp_path / "lines").read_text()))
    seen = {line["run"]: (line["device"], line["gpu"]) for line in found if line["part"] == "seen"}
    assert sorted(seen) == ["a", "b", "c", "d"] and all(device == gpu for device, gpu in seen.values())
    [other] = {"4", "7"} - {seen["b"][0]}
    assert {seen[name][0] for name in "acd"} == {other}
    assert sorted(line["run"] for line in found if line["part"] == "done") == ["a", "b", "c"]


def test_an_interrupted_call_ends_its_runs(tmp_path: Path) -> None:
    """Those that run as well as those that wait; threads of their own would go on with them."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "pathlib.Path(sys.argv[1]).write_text('')\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(30)\n"
    )
    commands = {name: [str(script), str(tmp_path / name)] for name in "ab"}
    with (tmp_path / "lines").open("w") as lines, pytest.raises(KeyboardInterrupt):
        Runs(commands).run_all("ab", None, lines)
    assert (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    assert not (tmp_path / "lines").read_text()


def test_ranks_are_started_by_torchrun() -> None:
    runs = Runs(bench_four_gpus.RUNS, vllm_python="other")
    ours, vllm = runs.command("ours-lora"), runs.command("vllm-lora")
    assert ours[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    assert ours[6].endswith("ours_gpu.py") and vllm[0] == "other" and vllm[1].endswith("peer_vllm.py")


def test_the_table_of_four_gpus() -> None:
    def line(kind: str, mode: str, step: float) -> dict[str, Any]:
        return decode_line("ours", mode, kind, 8, step, shape="70b")

    lines = Lines([line("none", "lora", 10.0), line("distinct", "lora", 11.0), line("same", "merged", 10.2)])
    told = {check.what.split(",")[0]: check.met for check in bench_four_gpus.checks(lines)}
    assert told == {"32 distinct ≤ 1.20 × our base": True, "merged ≤ 1.01 × our base": False}
    assert "| ours, merged | 10.20 |" in bench_four_gpus.table(lines)
