"""Runs of GPU benchmarks end in time, one on each device; the table of four GPUs."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench import bench_four_gpus, gpu_runs
from bench.gpu_checks import Lines
from bench.gpu_runs import Runs
from bench.gpu_workload import read_lines
from bench.kept_process import KeptProcess, descendants

from tests.scripts.test_bench_gpu import SCRIPTS, decode_line


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
        "os.kill(int(sys.argv[2]), signal.SIGINT)\n"
        "time.sleep(30)\n"
    )
    commands = {name: [str(script), str(tmp_path / name), str(os.getpid())] for name in "ab"}
    with (tmp_path / "lines").open("w") as lines, pytest.raises(KeyboardInterrupt):
        Runs(commands).run_all("ab", None, lines)
    assert (tmp_path / "a").exists() and not (tmp_path / "b").exists()
    assert not (tmp_path / "lines").read_text()


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """A run that starts another process in a session of its own, as torchrun does; both hold the FIFO."""
    os.mkfifo(tmp_path / "held")
    script = tmp_path / "ranks.py"
    script.write_text(
        "import signal, subprocess, sys\n"
        "held = open(sys.argv[1], 'w')\n"
        "if len(sys.argv) == 2:\n"
        "    rank = subprocess.Popen([sys.executable, *sys.argv, 'rank'], start_new_session=True)\n"
        "    rank.wait()\n"
        "held.write('here'), held.flush()\n"
        "signal.pause()\n"
    )
    return script


def hear(held: int) -> bytes:
    """What comes next from a FIFO's writers; nothing when the last of them has ended."""
    assert select.select([held], [], [], 60)[0], "a process lives on"
    return os.read(held, 100)


def test_a_killed_call_takes_its_runs_along(ranks: Path) -> None:
    """By a signal that it cannot see, whatever sessions its runs' own processes have."""
    fifo = ranks.parent / "held"
    code = (
        "import sys\n"
        "from bench.gpu_runs import Runs\n"
        f"Runs({{'ranks': [{str(ranks)!r}, {str(fifo)!r}]}}).run_all(['ranks'], None, sys.stdout)\n"
    )
    call = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SCRIPTS)})
    held = os.open(fifo, os.O_RDONLY)
    try:
        assert hear(held) == b"here"
        call.kill()
        assert hear(held) == b""
    finally:
        os.close(held)
        call.kill()
        call.wait()


def test_a_run_is_ended_with_the_other_sessions_that_it_has(ranks: Path) -> None:
    fifo = ranks.parent / "held"
    process = KeptProcess([sys.executable, str(ranks), str(fifo)], os.environ)
    held = os.open(fifo, os.O_RDONLY)
    try:
        assert hear(held) == b"here" and process.returncode is None
        process.end()
        assert hear(held) == b""
        # It did not end well.
        assert process.wait() == process.returncode == 1
    finally:
        os.close(held)
        process.end()


def test_a_keeper_that_is_killed_itself_takes_the_command_along(ranks: Path) -> None:
    fifo = ranks.parent / "held"
    process = KeptProcess([sys.executable, str(ranks), str(fifo), "alone"], os.environ)
    held = os.open(fifo, os.O_RDONLY)
    try:
        assert hear(held) == b"here"
        process._process.kill()
        assert hear(held) == b""
    finally:
        os.close(held)
        process.end()


def test_a_run_that_ends_takes_along_what_it_leaves_behind(tmp_path: Path) -> None:
    """The status is its own."""
    script = tmp_path / "leaves.py"
    script.write_text(
        "import subprocess, sys\n"
        "sleeps = [sys.executable, '-c', 'import signal; signal.pause()']\n"
        "subprocess.Popen(sleeps, start_new_session=True)\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    with (tmp_path / "lines").open("w") as lines:
        # What was left behind holds our pipe open.
        runs = Runs({"good": [str(script), "0"], "bad": [str(script), "3"]})
        assert runs.run_all(["good", "bad"], None, lines) == ["bad"]


def test_a_process_may_have_any_name() -> None:
    """Fifteen bytes, which may end within a letter; whoever looks through all processes meets it."""
    rename = "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'\\xe4bad) (', 0, 0, 0)"
    odd = f"{rename}; print('named', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", odd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as named:
        assert named.stdout is not None and named.stdout.readline() == "named\n"
        assert named.pid in descendants(os.getpid())


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
