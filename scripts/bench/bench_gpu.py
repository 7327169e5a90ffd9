"""Everything that is measured on a GPU, one program after another on one machine, as JSON and as tables.

    make bench-gpu [VLLM_PYTHON=...] or
    python scripts/bench/bench_gpu.py [--vllm-python PATH] [--vllm-path FOLDER] [--only RUN ...] [--budget SECONDS]
                                      [--lines run.jsonl] [--join earlier.jsonl ...] [--tables] [--tiny]

Every run is a process of its own, so that engines never share the device. Measurements are appended to ``--lines`` as
they come. Where a command may only take so long, give ``--budget``: no run goes on beyond it, and what had been
finished in the files of ``--join`` (made on the same machine) is not run again. ``--tables`` runs nothing: it joins.
Writes docs/results/gpu.json and prints the tables, with every target and whether it was met.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.gpu_checks import Lines, checks
from bench.gpu_tables import tables
from bench.gpu_workload import read_lines
from bench.report import write_result

_SOME = ["--part", "decode", "--kinds", "distinct"]
_THREE = ["--batches", "8", "32", "128"]
RUNS: dict[str, list[str]] = {
    "vllm-base": ["peer_vllm.py", "base"],
    "ours-base": ["ours_gpu.py", "base"],
    "ours-lora": ["ours_gpu.py", "lora"],
    "vllm-lora": ["peer_vllm.py", "lora"],
    "vllm-tuned": ["peer_vllm.py", "tuned", "--kinds", "same", "zipf", "distinct"],
    "ours-merged": ["ours_gpu.py", "merged", "--part", "decode", "merge"],
    # Once more, to see how long it takes with what the first one compiled.
    "start": ["ours_gpu.py", "lora", "--part", "merge"],
    "peft": ["peer_peft.py", "--part", "base", "one", "mixed"],
    "dropin": ["peer_peft.py", "--part", "dropin"],
    "ours-eight": ["ours_gpu.py", "lora", "--part", "decode", "--kinds", "eight", *_THREE],
    **{f"rank-{rank}": ["ours_gpu.py", "lora", "--rank", rank, *_SOME, *_THREE,
                         *(["--discard"] if rank in ("64", "128") else [])]
       for rank in ("8", "64", "128", "mix")},
    "neighbour": ["ours_gpu.py", "lora", "--rank", "8", "--resident-rank", "128", *_SOME, *_THREE],
    **{f"resident-{count}": ["ours_gpu.py", "lora", "--adapters", count, *_SOME, "--batches", "32", "128"]
       for count in ("1", "4", "8", "128")},
    "accuracy": ["accuracy_gpu.py"],
    "profile-base": ["profile_step.py", "base", "--batches", "32", "128"],
    "profile-lora": ["profile_step.py", "lora", "--batches", "32", "128"],
    "ttft": ["ttft_gpu.py"],
    "soak": ["soak_gpu.py"],
}  # fmt: skip


def environment_of(options: argparse.Namespace) -> dict[str, str]:
    """vLLM may live in a folder of packages rather than in a Python of its own."""
    found = dict(os.environ)
    if options.vllm_path:
        found["PYTHONPATH"] = os.pathsep.join([str(options.vllm_path), *filter(None, [found.get("PYTHONPATH")])])
    return found


def execute(name: str, options: argparse.Namespace, seconds: float | None, lines: TextIO) -> bool:
    """Run one; its lines go to ``lines`` at once. Whether it ended well and in time."""
    script, *arguments = RUNS[name]
    is_vllm = script == "peer_vllm.py"
    python = options.vllm_python if is_vllm and options.vllm_python else sys.executable
    command = [python, str(Path(__file__).parent / script), *arguments, *(["--tiny"] if options.tiny else [])]
    if options.folder:
        command += ["--folder", str(options.folder)]
    if options.set and not script.startswith("peer"):
        command += ["--set", *options.set]
    print(f"== {name}: {' '.join(command[1:])}", flush=True)
    # A session of its own: an engine's own processes hold the device, and have to end with it.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=environment_of(options) if is_vllm else None,
    )  # fmt: skip
    assert process.stdout is not None
    alarm = threading.Timer(seconds or threading.TIMEOUT_MAX, end, [process])
    alarm.daemon = True
    alarm.start()
    try:
        for text in process.stdout:
            print(text, end="", flush=True)
            for line in read_lines(text):
                lines.write(json.dumps({**line, "run": name}) + "\n")
                lines.flush()
        return process.wait() == 0
    finally:
        alarm.cancel()
        if process.poll() is None:
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process and those that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment() -> dict[str, Any]:
    """Of this machine, asked in another process: the one that starts engines must not hold a CUDA context."""
    told = subprocess.run([sys.executable, str(Path(__file__).with_name("report.py"))], capture_output=True, check=True)
    found: dict[str, Any] = json.loads(told.stdout)
    return found


def run_all(names: Iterable[str], options: argparse.Namespace, lines: TextIO) -> list[str]:
    """Those that failed or were not reached."""
    start, left = time.monotonic(), []
    for name in names:
        seconds = options.budget - (time.monotonic() - start) if options.budget else None
        if seconds is not None and seconds < 30:
            left.append(name)
        elif execute(name, options, seconds, lines):
            lines.write(json.dumps({"part": "done", "run": name}) + "\n")
            lines.flush()
        else:
            left.append(name)
    return left


def machine(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What all lines were measured on.

    Raises:
        SystemExit: they are of several machines, or of none.
    """
    seen = [line for line in found if line.get("part") == "environment"]
    kinds = {(line.get("gpu"), line.get("driver"), line["cpu"], line["torch"]) for line in seen}
    if len(kinds) != 1:
        raise SystemExit(
            f"the lines come from {len(kinds)} machines, which must not be compared: {sorted(map(str, kinds))}"
        )
    versions = {f"{line['engine']} version": line["version"] for line in found if "version" in line}
    return {key: value for key, value in seen[-1].items() if key != "part"} | versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="Python of an environment that has vLLM; without one it is left out")
    parser.add_argument("--vllm-path", type=Path, help="folder with vLLM's packages, for PYTHONPATH")
    parser.add_argument("--only", nargs="+", choices=tuple(RUNS), default=list(RUNS))
    parser.add_argument("--budget", type=float, help="seconds for all runs of this call")
    parser.add_argument("--lines", type=Path, help="where measurements are appended (default: a new file)")
    parser.add_argument("--join", nargs="*", type=Path, default=[], help="files of earlier calls")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--folder", type=Path, help="where models and adapters are written")
    parser.add_argument("--output", type=Path, help="folder for gpu.json (default: docs/results)")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=JSON", help="options of our engine")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try everything on a CPU")
    options = parser.parse_args()
    found = [line for path in options.join for line in read_lines(path.read_text())]
    if not options.tables:
        path = options.lines or Path(tempfile.mkstemp(prefix="bench-gpu-", suffix=".jsonl")[1])
        done = {line["run"] for line in found if line.get("part") == "done"}
        with_vllm = options.vllm_python or options.vllm_path
        names = [n for n in options.only if n not in done and (with_vllm or not n.startswith("vllm"))]
        with path.open("a") as lines:
            lines.write(json.dumps({"part": "environment", **environment()}) + "\n")
            left = run_all(names, options, lines)
        print(f"\nlines in {path}", f"not finished: {' '.join(left)}" if left else "all runs finished", sep="\n")
        found += read_lines(path.read_text())
    lines_found = Lines(found)
    judged = checks(lines_found)
    for table in filter(None, tables(lines_found, judged)):
        print(f"\n{table}", end="")
    measured = [line for line in found if line.get("part") not in ("environment", "done", "soak so far")]
    figures = {"checks": [check.as_dict() for check in judged], "measurements": measured}
    print("\nwritten to", write_result("gpu", figures, options.output, machine(found)))


if __name__ == "__main__":
    main()
