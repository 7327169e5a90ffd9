"""Where a decode step's time goes on the GPU: how long it idles, and which kernels run, how often, for how long.

    python scripts/bench/profile_step.py [base|lora|merged] [--kinds distinct] [--batches 128] [--steps 30]
                                         [--part decode prefill throughput] [--trace trace.json]
    torchrun --nproc-per-node 2 scripts/bench/profile_step.py ...

One saturated run through ``LLM.generate``. The first stretch of steps warms up, the second is timed by the clock
alone, the third is recorded by torch.profiler (CUDA activities; kernels inside replayed graphs included), which makes
it a little slower: compare the two times of a step. The first step after the profiler's start is left out: it waits
for that. Idle is the share of the window of whole steps in which no kernel and no copy runs on the device, of which
gaps of up to 2 µs, the device's own between two kernels of a graph, are told apart from longer ones. On a CPU the
operators stand in for kernels, to try the script. Of several ranks the first one's device is recorded. Prints a table
and, as the last line, JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.gpu_engine import DEVICE, add_engine_options, engine_options, follow, runner, start, synchronize
from bench.gpu_options import make_parser, parse, sizes_of
from bench.gpu_workload import PROMPT_TOKENS, Stream, choose_for_throughput, emit, ranks_of, write_adapters, write_base
from bench.timeline import Interval, summarise

CATEGORIES = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}


class Window:
    """Watches an engine's steps: warm-up, then ``steps`` on the clock, then one more and ``steps`` recorded.

    Marks on the device's stream, before the first and behind the last of these, tell them from what is around.
    """

    def __init__(self, engine: Any, steps: int, skip: int, activities: Iterable[ProfilerActivity]) -> None:
        self.recorder = profile(activities=list(activities))
        self.step_ms = 0.0
        self.done = False
        self._step, self._steps, self._skip = engine.step, steps, skip
        self._count, self._start = 0, 0.0
        self._mark = torch.zeros(1, device=DEVICE).frac_()
        engine.step = self.step

    def step(self, now: float) -> Any:
        if self._count == self._skip:
            self._start = time.perf_counter()
        elif self._count == self._skip + self._steps:
            self.step_ms = (time.perf_counter() - self._start) / self._steps * 1e3
            synchronize()
            self.recorder.start()
        elif self._count == self._skip + self._steps + 1:
            self._mark.frac_()
        elif self._count == self._skip + 2 * self._steps + 1:
            self._mark.frac_()
            synchronize()
            self.recorder.stop()
            self.done = True
        self._count += 1
        return self._step(now)


def intervals(recorder: profile, keep: Path | None) -> list[Interval]:
    """(name, start, end) in microseconds of what ran on the device."""
    with tempfile.TemporaryDirectory() as folder:
        path = keep or Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    wanted = CATEGORIES[DEVICE]
    return [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("ph") == "X" and e.get("cat") in wanted]


def drive(llm: Any, options: Namespace, kind: str, batch: int, part: str) -> Window:
    """Run one load, recording its middle."""
    run, skip = runner(llm), 2 if options.tiny else options.skip
    window_tokens = skip + 2 * options.steps + 9
    stream = Stream("profile", options.shape, options.adapters)
    chosen = stream.choose(kind, batch)
    run([stream.prompt(16) for _ in range(batch)], [8] * batch, chosen)
    activities = [ProfilerActivity.CUDA] if DEVICE == "cuda" else [ProfilerActivity.CPU]
    if part == "decode":
        prefill = -(-batch * PROMPT_TOKENS // llm._open.config.max_num_batched_tokens) + 1
        window = Window(llm._open.engine, options.steps, prefill + skip, activities)
        run([stream.prompt(PROMPT_TOKENS) for _ in range(batch)], [window_tokens + 2 * prefill] * batch, chosen)
    elif part == "prefill":
        window = Window(llm._open.engine, options.steps, skip, activities)
        count = window_tokens * -(-llm._open.config.max_num_batched_tokens // PROMPT_TOKENS)
        run([stream.prompt(PROMPT_TOKENS) for _ in range(count)], [1] * count, stream.choose(kind, count))
    else:
        sizes = sizes_of(options)
        window = Window(llm._open.engine, options.steps, skip, activities)
        prompts = [stream.prompt(tokens) for tokens, _ in sizes]
        run(prompts, [count for _, count in sizes], choose_for_throughput(kind, len(sizes), options.adapters))
    del llm._open.engine.step  # The class's own again.
    if not window.done:
        raise SystemExit(f"the run ended before {2 * options.steps + 1} steps were seen: give fewer --steps")
    return window


def show(figures: dict[str, Any]) -> None:
    print(f"\n{figures['mode']}, {figures['adapters']}, {figures['part']}, batch {figures['batch']}: "
          f"{figures['step_ms']:.3f} ms a step, {figures['recorded_step_ms']:.3f} ms recorded, "
          f"{figures['idle_share']:.1%} idle ({figures['idle_us_per_step']:.0f} µs a step: "
          f"{figures['gaps_us_per_step']:.0f} in {figures['gaps_per_step']:.1f} gaps above 2 µs, the longest "
          f"{figures['longest_gap_us']:.0f} µs, and {figures['launch_gaps_us_per_step']:.0f} in "
          f"{figures['launch_gaps_per_step']:.0f} between kernels)")  # fmt: skip
    print(f"{'µs/step':>10} {'share':>6} {'calls/step':>10} {'µs/call':>8}  kernel")
    for row in figures["kernels"]:
        print(f"{row['us_per_step']:10.1f} {row['share']:6.1%} {row['calls_per_step']:10.1f} "
              f"{row['us_per_step'] / row['calls_per_step']:8.2f}  {row['name'][:110]}")  # fmt: skip


def main() -> None:
    parser = make_parser(__doc__, ("decode", "throughput", "prefill"))
    add_engine_options(parser)
    parser.add_argument("mode", nargs="?", choices=("base", "lora", "merged"), default="lora")
    parser.add_argument("--steps", type=int, default=30, help="steps of each of the two windows")
    parser.add_argument("--skip", type=int, default=12, help="steps before the first window, after the prefill")
    parser.add_argument("--top", type=int, default=25, help="kernels to show")
    parser.add_argument("--trace", type=Path, help="keep the Chrome trace of the last run here")
    parser.set_defaults(part=["decode"], batches=[128], kinds=["distinct"])
    options = parse(parser)
    options.batches = options.batches or [4]
    ranks = ranks_of(options.rank, {"base": 0, "lora": options.adapters, "merged": 1}[options.mode])
    merging = {"policy": "merge", "merge": "shadow"} if options.mode == "merged" else {}
    if follow(str(write_base(options.shape, options.folder)), **engine_options(options, ranks, **merging)):
        return
    paths = write_adapters(options.shape, options.folder, ranks, DEVICE)
    llm = start(options, paths, ranks, **merging)
    kinds = {"base": ["none"], "merged": ["same"]}.get(options.mode, options.kinds)
    for part in options.part:
        for kind in kinds:
            for batch in options.batches:
                window = drive(llm, options, kind, batch, part)
                found = summarise(intervals(window.recorder, options.trace), options.steps, options.top)
                figures = {"engine": "ours", "mode": options.mode, "part": part, "adapters": kind, "batch": batch,
                           "steps": options.steps, "step_ms": round(window.step_ms, 4), **found}  # fmt: skip
                show(figures)
                emit(**{**figures, "part": f"profile {part}"})
    llm.close()


if __name__ == "__main__":
    torch.set_num_threads(1) if DEVICE == "cpu" else None
    main()
