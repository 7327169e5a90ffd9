"""Everything that is measured on a GPU, one program after another on one machine, as JSON and as tables.

    make bench-gpu [VLLM_PYTHON=...] or
    python scripts/bench/bench_gpu.py [--vllm-python PATH] [--vllm-path FOLDER] [--only RUN ...] [--budget SECONDS]
                                      [--devices 0 1 2 3] [--lines run.jsonl] [--join earlier.jsonl ...]
                                      [--tables] [--tiny]

Every run is a process of its own, so that engines never share a device; of several (``--devices``) each takes the next
run when it is free, and what is compared may come from two cards of the machine: a line says from which. Measurements
are appended to ``--lines`` as they come. Where a command may only take so long, give ``--budget``: no run goes on
beyond it, and what had been finished in the files of ``--join`` (made on the same machine) is not run again.
``--tables`` runs nothing: it joins.
Writes docs/results/gpu.json and prints the tables, with every target and whether it was met.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.gpu_checks import Lines, checks
from bench.gpu_runs import Runs
from bench.gpu_tables import tables
from bench.gpu_workload import read_lines
from bench.report import environment_apart, write_result

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
    # The last takes all seats.
    "profile-base": ["profile_step.py", "base", "--batches", "32", "128", "256"],
    "profile-lora": ["profile_step.py", "lora", "--batches", "32", "128", "256"],
    "ttft": ["ttft_gpu.py"],
    "soak": ["soak_gpu.py"],
}  # fmt: skip


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
    parser.add_argument("--devices", nargs="+", default=[], metavar="GPU", help="GPUs that take runs side by side")
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
        shared = ["--tiny"] * options.tiny + (["--folder", str(options.folder)] if options.folder else [])
        runs = Runs(
            RUNS, options.vllm_python, options.vllm_path, shared, ["--set", *options.set] if options.set else [],
            options.devices,
        )  # fmt: skip
        with path.open("a") as lines:
            lines.write(json.dumps({"part": "environment", **environment_apart()}) + "\n")
            left = runs.run_all(names, options.budget, lines)
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
