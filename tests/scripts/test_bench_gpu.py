"""The GPU benchmarks' workload is fixed, their verdicts follow from the lines, and our side runs on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench import bench_gpu
from bench.gpu_checks import Check, Lines, checks
from bench.gpu_tables import tables
from bench.gpu_workload import (
    SEATS,
    SHAPES,
    Run,
    Stream,
    choose_for_throughput,
    lengths,
    linear_shapes,
    ranks_of,
    read_lines,
    time_decode,
    time_throughput,
    write_adapters,
    write_base,
)
from bench.timeline import Interval, busy_spans, summarise
from safetensors.torch import load_file

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_the_throughput_workload_is_vllms() -> None:
    sizes = lengths()
    assert len(sizes) == 512 and sizes == lengths()
    assert [sum(column) for column in zip(*sizes, strict=True)] == [87_022, 92_210]
    assert all(4 <= tokens <= 1024 for pair in sizes for tokens in pair)


@pytest.mark.parametrize("mode", ["base", "lora"])
def test_profiles_are_of_a_run_with_all_seats_taken_too(mode: str) -> None:
    batches = [int(word) for word in bench_gpu.RUNS[f"profile-{mode}"] if word.isdecimal()]
    assert batches == [32, 128, SEATS]


def test_popularity() -> None:
    stream = Stream("x", "8b")
    assert stream.choose("none", 3) is None
    assert stream.choose("same", 3) == [0, 0, 0]
    assert stream.choose("distinct", 34) == [*range(32), 0, 1]
    assert stream.choose("eight", 10) == [*range(8), 0, 1]
    drawn = Stream("x", "8b").choose("zipf", 20_000) or []
    # A Pareto variable of index 1 falls between n and n + 1 with the chance 1/n - 1/(n + 1).
    assert [drawn.count(n) / len(drawn) for n in range(3)] == pytest.approx([1 / 2, 1 / 6, 1 / 12], abs=0.01)
    assert max(drawn) == 31 and min(drawn) == 0
    drawn = choose_for_throughput("zipf", 20_000) or []
    assert drawn == choose_for_throughput("zipf", 20_000)
    assert drawn.count(0) / drawn.count(3) == pytest.approx(4, rel=0.1)


def test_prompts_depend_on_what_is_measured_alone() -> None:
    first, again, other = Stream("zipf 8", "8b"), Stream("zipf 8", "8b"), Stream("zipf 32", "8b")
    assert first.prompt(500) == again.prompt(500) != other.prompt(500)
    assert all(1000 <= token < 100_000 for token in first.prompt(5000))
    assert all(token < SHAPES["tiny"]["vocab_size"] for token in Stream("", "tiny").prompt(5000))


def test_ranks() -> None:
    assert ranks_of("16", 3) == [16, 16, 16] and ranks_of("mix", 5) == [8, 16, 64, 128, 8]


class Clock:
    """A run: 2 s for the prefill and ``step`` for each token after the first, but a second more every other time."""

    def __init__(self, step: float) -> None:
        self.step = step
        self.asked: list[tuple[list[int], list[int], list[int] | None]] = []

    def __call__(self, prompts: list[list[int]], counts: list[int], adapters: list[int] | None) -> float:
        self.asked.append(([len(prompt) for prompt in prompts], counts, adapters))
        return 2.0 + self.step * (max(counts) - 1) + (len(self.asked) % 2)


def test_a_step_is_the_best_long_run_less_the_best_short_one() -> None:
    run = Clock(0.5)
    figures = time_decode(run, "8b", "distinct", 40)
    assert figures["step_ms"] == 500 and figures["prefill_ms"] == 2000 and figures["tokens_per_s"] == 80
    assert figures["distinct"] == 32
    assert [(prompts[0], counts[0]) for prompts, counts, _ in run.asked] == [
        *[(16, 8), (128, 1), (128, 1), (128, 129), (128, 129)]
    ]
    assert {(len(p), len(c), tuple(a or ())) for p, c, a in run.asked} == {(40, 40, (*range(32), *range(8)))}


def test_throughput_counts_what_was_asked() -> None:
    run: Run = Clock(0.0)
    figures = time_throughput(run, "8b", "zipf")
    assert figures["prompt_tokens"] == 87_022 and figures["output_tokens"] == 92_210 and figures["requests"] == 512
    assert figures["output_tokens_per_s"] == 46105.0  # 2 s: the run before it, which loads the adapters, took 3.
    assert 100 < figures["most_of_one_adapter"] < 160


def test_adapters_are_pefts_files(tmp_path: Path) -> None:
    paths = write_adapters("tiny", tmp_path, [8, 16])
    tensors = load_file(paths["adapter1"] / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    for name, (inputs, outputs) in linear_shapes("tiny").items():
        key = f"base_model.model.model.layers.1.{name}"
        assert tensors[f"{key}.lora_A.weight"].shape == (16, inputs)
        assert tensors[f"{key}.lora_B.weight"].shape == (outputs, 16)
    stamp = (paths["adapter0"] / "adapter_model.safetensors").stat().st_mtime_ns
    assert write_adapters("tiny", tmp_path, [8]) == {"adapter0": paths["adapter0"]}
    assert (paths["adapter0"] / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in write_base("tiny", tmp_path).iterdir()] == ["config.json"]


def test_who_reads_a_base_that_is_written_again_finds_it_whole(tmp_path: Path) -> None:
    config = write_base("tiny", tmp_path) / "config.json"
    with config.open() as reading:
        write_base("tiny", tmp_path)
        assert json.load(reading) == json.loads(config.read_text())
        assert os.fstat(reading.fileno()).st_ino != config.stat().st_ino, "another file was put in its place"


def decode_line(engine: str, mode: str, kind: str, batch: int, step: float, **more: Any) -> dict[str, Any]:
    usual = {"rank": "16", "resident": 32, "shape": "8b", "steps": 9, "merged_steps": 9}
    figures = {"engine": engine, "mode": mode, "part": "decode", "adapters": kind, "batch": batch, "step_ms": step}
    return {**usual, **figures, "prefill_ms": 50 * step, **more}


LINES = [
    decode_line("vllm", "base", "none", 32, 5.34),
    decode_line("vllm", "lora", "distinct", 32, 18.62),
    decode_line("vllm", "tuned", "distinct", 32, 16.48),
    decode_line("ours", "base", "none", 32, 5.0),
    decode_line("ours", "merged", "same", 32, 5.1, resident=2),
    decode_line("ours", "lora", "same", 32, 5.6),
    decode_line("ours", "lora", "distinct", 32, 5.9),
    decode_line("ours", "lora", "distinct", 32, 5.2, resident=4),
    decode_line("ours", "lora", "distinct", 32, 5.5, rank="8"),
    decode_line("ours", "lora", "distinct", 32, 5.6, rank="8", resident_rank=128),
]


def test_verdicts_follow_from_the_lines() -> None:
    found = {check.what: check for check in checks(Lines(LINES))}
    assert {what: check.verdict for what, check in found.items()} == {
        "base ≤ 0.97 × vLLM's base, B=32, ms": "met",
        "merged ≤ 1.01 × our base, B=32, ms": "missed by 1.0%",
        "one adapter ≤ 1.10 × our base, B=32, ms": "missed by 1.8%",
        "32 distinct ≤ 1.20 × our base, B=32, ms": "met",
        "32 distinct ≤ 0.5 × vLLM's better, B=32, ms": "met",
        "merged: share of steps that were, B=32": "met",
        "rank 8 beside a resident rank 128 ≤ 1.02 × alone, B=32, ms": "met",
    }
    assert found["32 distinct ≤ 0.5 × vLLM's better, B=32, ms"].limit == pytest.approx(8.24)
    assert Check("x", 30, 60, at_least=True).verdict == "missed by 50.0%"
    assert Check("x", 60, 60, at_least=True).met and Check("x", 60, 60).met


def test_tables_show_each_kind_in_its_row() -> None:
    text = "\n".join(tables(Lines(LINES), checks(Lines(LINES))))
    for row in (
        "| vLLM tuned, 32 distinct | 16.48 |",
        "| ours, base only | 5.00 |",
        "| ours, 32 distinct | 5.90 (1.18) |",
        "| ours, 32 distinct | 0.36 |",
        "| rank 8 beside a resident 128 | 5.60 |",
        "| 4 resident | 5.20 |",
        "| merged ≤ 1.01 × our base, B=32, ms | 5.1 | 5.05 | missed by 1.0% |",
    ):
        assert row in text


def test_a_timeline_counts_overlapping_streams_once() -> None:
    recorded = [("a", 10.0, 20.0), ("b", 15.0, 18.0), ("a", 30.0, 40.0), ("c", 39.0, 50.0), ("a", 51.0, 60.0)]
    assert busy_spans(recorded) == [(10.0, 20.0), (30.0, 50.0), (51.0, 60.0)]
    found = summarise([*marks(10.0, 60.0), *recorded], steps=2)
    assert found["idle_share"] == pytest.approx(11 / 50) and found["busy_share"] == pytest.approx(39 / 50)
    assert found["longest_gap_us"] == 10 and found["gaps_per_step"] == 0.5 and found["recorded_step_ms"] == 0.025
    assert found["gap_share"] == pytest.approx(10 / 50) and found["gaps_us_per_step"] == 5
    assert found["launch_gap_share"] == pytest.approx(1 / 50)
    assert (found["launch_gaps_us_per_step"], found["launch_gaps_per_step"]) == (0.5, 0.5)
    assert found["kernels"][0] == {"name": "a", "us_per_step": 14.5, "share": 0.58, "calls_per_step": 1.5}
    with pytest.raises(ValueError, match="nothing was recorded between"):
        summarise(marks(10.0, 60.0), 1)


def marks(begin: float, end: float) -> list[Interval]:
    """Of a window."""
    return [("void frac_kernel", begin - 1.0, begin), ("void frac_kernel", end, end + 1.0)]


def test_a_timeline_leaves_out_what_is_not_of_whole_steps() -> None:
    early = [("copy", 0.0, 1.0), ("a", 801.0, 810.0)]
    # Between the marks and the first and last kernels the device is idle too.
    window = [("a", 823.0, 840.0), ("b", 841.0, 850.0)]
    found = summarise([*early, *marks(820.0, 860.0), *window, ("late", 862.0, 900.0)], steps=1)
    assert (found["recorded_step_ms"], found["kernels_per_step"], found["longest_gap_us"]) == (0.04, 2, 10)
    assert (found["gaps_us_per_step"], found["launch_gaps_us_per_step"], found["idle_us_per_step"]) == (13, 1, 14)
    assert {row["name"] for row in found["kernels"]} == {"a", "b"}
    for recorded in ([], window, marks(820.0, 860.0)[:1]):
        with pytest.raises(ValueError, match="marks were recorded, not 2"):
            summarise(recorded, 1)


def test_lines_of_two_machines_are_not_joined() -> None:
    here = {"part": "environment", "cpu": "c", "torch": "2", "gpu": "H200", "driver": "580"}
    started = {"engine": "vllm", "part": "start", "version": "0.25.1"}
    assert bench_gpu.machine([here, started, here])["vllm version"] == "0.25.1"
    with pytest.raises(SystemExit, match="2 machines"):
        bench_gpu.machine([here, {**here, "driver": "590"}])
    with pytest.raises(SystemExit, match="0 machines"):
        bench_gpu.machine([started])


def run_script(name: str, *arguments: str) -> str:
    command = [sys.executable, str(SCRIPTS / "bench" / name), "--tiny", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_our_side_runs_small(tmp_path: Path) -> None:
    lines, folder = tmp_path / "lines.jsonl", str(tmp_path)
    usual = ("--folder", folder, "--output", folder)
    run_script("bench_gpu.py", "--only", "ours-merged", "--lines", str(lines), *usual)
    second = run_script("bench_gpu.py", "--only", "ours-merged", "ours-eight", "--join", str(lines), *usual)
    assert "== ours-merged" not in second and "== ours-eight" in second and "all runs finished" in second
    result = json.loads((tmp_path / "gpu.json").read_text())
    found = result["figures"]["measurements"]
    merged = [line for line in found if line["part"] == "decode" and line["mode"] == "merged"]
    assert [line["batch"] for line in merged] == [1, 8]
    assert all(line["merged_steps"] == line["steps"] > 0 for line in merged)
    assert any(line["run"] == "ours-eight" and line["part"] == "decode" for line in found)
    assert "torch" in result["environment"] and "part" not in result["environment"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["accuracy_gpu.py", "ttft_gpu.py", "soak_gpu.py", "profile_step.py", "peer_peft.py"])
def test_the_others_run_small(script: str, tmp_path: Path) -> None:
    found = list(read_lines(run_script(script, "--folder", str(tmp_path))))
    assert found
    if script == "accuracy_gpu.py":
        assert all(line["ours_over_peft_autocast"] < 1.05 for line in found)
    if script == "ttft_gpu.py":
        assert found[0]["loads"]["without_loads"] == 0 and found[0]["loads"]["with_loads"] >= 100
    if script == "soak_gpu.py":
        # A run that ends nowhere tells how far it came.
        started = [line["started"] for line in found if line["part"] == "start"]
        assert started == ["nothing", "model", "adapters", "steps"] and found[-1]["part"] == "soak"


FAKE_VLLM = {
    "vllm/__init__.py": """
import json, os
__version__ = "0.0.stand-in"
class SamplingParams:
    def __init__(self, **options):
        self.max_tokens = options.pop("max_tokens")
        assert options == {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
class LLM:
    def __init__(self, **options):
        flags = os.environ.get("VLLM_LORA_ENABLE_DUAL_STREAM")
        print(json.dumps({"part": "options", "dual_stream": flags, **options}), flush=True)
    def generate(self, prompts, params, lora_request, use_tqdm):
        from types import SimpleNamespace as Record
        assert lora_request is None or len(lora_request) == len(prompts)
        assert all(isinstance(token, int) for prompt in prompts for token in prompt["prompt_token_ids"])
        return [Record(outputs=[Record(token_ids=[0] * own.max_tokens)]) for own in params]
""",
    "vllm/lora/__init__.py": "",
    "vllm/lora/request.py": """
from pathlib import Path
class LoRARequest:
    def __init__(self, name, number, path):
        assert number > 0 and (Path(path) / "adapter_model.safetensors").exists()
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["base", "lora", "tuned"])
def test_vllm_gets_the_documented_options(mode: str, tmp_path: Path) -> None:
    for name, text in FAKE_VLLM.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    lines, folder = tmp_path / "lines", str(tmp_path / "out")
    usual = ("--lines", str(lines), "--folder", folder, "--output", folder)
    run_script("bench_gpu.py", "--only", f"vllm-{mode}", "--vllm-path", str(tmp_path), *usual)
    found = list(read_lines(lines.read_text()))
    options = next(line for line in found if line["part"] == "options")
    assert options["load_format"] == "dummy" and options["gpu_memory_utilization"] == 0.6
    assert options["enable_prefix_caching"] is False and options["max_num_seqs"] == 256
    assert (options.get("max_loras"), options.get("max_lora_rank")) == ((None, None) if mode == "base" else (8, 16))
    assert options.get("specialize_active_lora", False) == (mode == "tuned") == (options["dual_stream"] == "1")
    kinds = {"base": ["none"], "lora": ["none", "same", "zipf", "distinct"], "tuned": ["same", "zipf", "distinct"]}[
        mode
    ]
    measured = [(line["adapters"], line["batch"]) for line in found if line["part"] == "decode"]
    assert measured == [(kind, batch) for kind in kinds for batch in (1, 8)]
    assert [line["adapters"] for line in found if line["part"] == "throughput"] == kinds
    result = json.loads((tmp_path / "out/gpu.json").read_text())
    assert result["environment"]["vllm version"] == "0.0.stand-in"
