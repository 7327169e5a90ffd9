"""One replica over four GPUs, and vLLM beside it: Llama-2's 70b shape, and the 8B shape over one, two and four.

    python scripts/bench/bench_four_gpus.py [--vllm-path FOLDER] [--only RUN ...] [--budget SECONDS]
                                            [--lines run.jsonl] [--join earlier.jsonl ...] [--tables] [--tiny]

As bench_gpu.py, most of whose options these are. The merged rows come from a second copy of the weights. Writes
docs/results/four_gpus.json and prints the table with every target and whether it was met.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.bench_gpu import machine
from bench.gpu_checks import Check, Line, Lines
from bench.gpu_runs import Runs
from bench.gpu_workload import read_lines
from bench.report import environment_apart, write_result

RANKS = 4
_BATCHES = ["--batches", "1", "8", "32", "64", "128", "--new-tokens", "65"]
_70B = ["--shape", "70b", "--memory", "0.9", *_BATCHES]
_OURS, _SEQUENCES = ["torchrun", str(RANKS), "ours_gpu.py"], ["--set", "max_num_seqs=128"]
_KINDS = ["--kinds", "none", "same", "distinct"]
RUNS: dict[str, list[str]] = {
    "ours-lora": [*_OURS, "lora", *_70B, "--part", "decode", "prefill", *_KINDS, *_SEQUENCES],
    "ours-merged": [*_OURS, "merged", *_70B, "--part", "decode", "merge", *_SEQUENCES],
    "vllm-base": ["peer_vllm.py", "base", *_70B, "--part", "decode", "prefill", "--ranks", str(RANKS)],
    "vllm-lora": ["peer_vllm.py", "lora", *_70B, "--part", "decode", "prefill", "--ranks", str(RANKS),
                  "--kinds", "same", "distinct"],
    **{f"8b-tp{ranks}": ["torchrun", str(ranks), "profile_step.py", "lora", *_KINDS[:2], "distinct",
                         "--batches", "8", "32", "128"] for ranks in (1, 2, 4)},
}  # fmt: skip


def decode(lines: Lines, engine: str, kind: str, mode: str | None = None) -> dict[int, Line]:
    """The 70b shape's decode lines by batch size."""
    more = {} if mode is None else {"mode": mode}
    found = lines.find(engine=engine, part="decode", adapters=kind, **more)
    return {line["batch"]: line for line in found}


def checks(lines: Lines) -> Iterator[Check]:
    base = decode(lines, "ours", "none", "lora")
    for what, own, factor in (
        ("one adapter ≤ 1.10 × our base", decode(lines, "ours", "same", "lora"), 1.10),
        ("32 distinct ≤ 1.20 × our base", decode(lines, "ours", "distinct", "lora"), 1.20),
        ("merged ≤ 1.01 × our base", decode(lines, "ours", "same", "merged"), 1.01),
    ):
        for batch in sorted(own.keys() & base.keys()):
            yield Check(f"{what}, B={batch}, ms", own[batch]["step_ms"], factor * base[batch]["step_ms"])


def table(lines: Lines) -> str:
    """Markdown: the 70b shape's steps and prefills, and the 8B shape's steps by the number of GPUs."""
    rows = {
        "ours, base": decode(lines, "ours", "none", "lora"),
        "ours, one adapter": decode(lines, "ours", "same", "lora"),
        "ours, 32 distinct": decode(lines, "ours", "distinct", "lora"),
        "ours, merged": decode(lines, "ours", "same", "merged"),
        "vLLM, base": decode(lines, "vllm", "none", "base"),
        "vLLM, one adapter": decode(lines, "vllm", "same", "lora"),
        "vLLM, 32 distinct": decode(lines, "vllm", "distinct", "lora"),
    }
    batches = sorted({batch for row in rows.values() for batch in row})
    found = [
        "| decode step, ms | " + " | ".join(f"B={batch}" for batch in batches) + " |",
        "|---" * (1 + len(batches)) + "|",
    ]
    for name, row in rows.items():
        if row:
            cells = (f"{row[batch]['step_ms']:.2f}" if batch in row else "" for batch in batches)
            found.append(f"| {name} | " + " | ".join(cells) + " |")
    for line in lines.find(part="prefill"):
        told = f"{line['engine']}, {line['adapters']}: prefill of {line['batch']} × {line['each_prompt_tokens']}"
        found.append(f"\n{told} tokens: {line['prefill_ms']:.0f} ms")
    for line in lines.find(part="merge"):
        found.append(f"\nmerged ({line['way']}): {line['merge_ms']:.1f} ms, unmerged {line['unmerge_ms']:.1f} ms")
    return "\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="Python of an environment that has vLLM; without one it is left out")
    parser.add_argument("--vllm-path", type=Path, help="folder with vLLM's packages, for PYTHONPATH")
    parser.add_argument("--only", nargs="+", choices=tuple(RUNS), default=list(RUNS))
    parser.add_argument("--budget", type=float, help="seconds for all runs of this call")
    parser.add_argument("--lines", type=Path, help="where measurements are appended (default: a new file)")
    parser.add_argument("--join", nargs="*", type=Path, default=[], help="files of earlier calls")
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, help="folder for four_gpus.json (default: docs/results)")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try everything on a CPU")
    options = parser.parse_args()
    found: list[dict[str, Any]] = [line for path in options.join for line in read_lines(path.read_text())]
    if not options.tables:
        path = options.lines or Path(tempfile.mkstemp(prefix="bench-four-", suffix=".jsonl")[1])
        done = {line["run"] for line in found if line.get("part") == "done"}
        with_vllm = options.vllm_python or options.vllm_path
        names = [n for n in options.only if n not in done and (with_vllm or not n.startswith("vllm"))]
        runs = Runs(RUNS, options.vllm_python, options.vllm_path, ["--tiny"] * options.tiny)
        with path.open("a") as lines:
            lines.write(json.dumps({"part": "environment", **environment_apart()}) + "\n")
            left = runs.run_all(names, options.budget, lines)
        print(f"\nlines in {path}", f"not finished: {' '.join(left)}" if left else "all runs finished", sep="\n")
        found += read_lines(path.read_text())
    judged = list(checks(Lines(found)))
    print(table(Lines(found)))
    for check in judged:
        print(f"{check.what}: {check.value:.2f} ({check.limit:.2f}): {check.verdict}")
    measured = [line for line in found if line.get("part") not in ("environment", "done")]
    figures = {"checks": [check.as_dict() for check in judged], "measurements": measured}
    print("\nwritten to", write_result("four_gpus", figures, options.output, machine(found)))


if __name__ == "__main__":
    main()
