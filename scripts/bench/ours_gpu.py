"""Our decode, prefill and throughput through ``LLM.generate`` on one GPU, measured as peer_vllm.py measures vLLM.

    python scripts/bench/ours_gpu.py base|lora|merged [--part decode throughput merge] [--batches 1 8] [--kinds same]

base: an engine without adapters. lora: 32 adapters (``--adapters``, ``--rank``), never merged. merged: one adapter,
merged into a second copy of the weights; every line says how many of its steps were. ``--part merge`` (with merged)
times merging itself beside the device's copy bandwidth. ``--resident-rank 128`` has one more adapter of that rank on
the device that no request asks for. One JSON line a measurement.

    torchrun --nproc-per-node 4 scripts/bench/ours_gpu.py lora --shape 70b --memory 0.9 --part decode prefill

One replica over as many GPUs. ``--part prefill`` times 32 prompts of 512 tokens; merging is timed by the first GPU,
which moves its share of the bytes.
"""

from __future__ import annotations

import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.gpu_engine import DEVICE, add_engine_options, engine_options, follow, runner, start, synchronize, world_size
from bench.gpu_options import kinds_of, make_parser, parse, sizes_of
from bench.gpu_workload import (
    NEW_TOKENS,
    PREFILL,
    SHAPES,
    clocked,
    emit,
    linear_shapes,
    ranks_of,
    time_decode,
    time_prefill,
    time_throughput,
    write_adapters,
    write_base,
)

KINDS = {"base": ("none",), "lora": ("none", "same", "zipf", "distinct", "eight"), "merged": ("same",)}


def with_steps(llm: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` measured, with how many engine steps it took, and how many of those ran merged."""
    before = llm._open.engine.detail()
    figures = work()
    after = llm._open.engine.detail()
    steps, merged = after.num_steps - before.num_steps, after.num_merged_steps - before.num_merged_steps
    return {**figures, "steps": steps, "merged_steps": merged}


def measure(llm: Any, options: Namespace, label: dict[str, Any], count: int) -> None:
    """``count`` adapters may be asked for."""
    run, new_tokens = runner(llm), options.new_tokens or NEW_TOKENS
    kinds = kinds_of(options, KINDS[options.mode])
    for kind in kinds if "decode" in options.part else ():
        for batch in options.batches:
            work = partial(time_decode, run, options.shape, kind, batch, count, new_tokens)
            emit(**label, part="decode", **with_steps(llm, work))
    for kind in kinds if "prefill" in options.part else ():
        work = partial(time_prefill, run, options.shape, kind, *(4, 16) if options.tiny else PREFILL, count)
        emit(**label, part="prefill", **with_steps(llm, work))
    for kind in kinds if "throughput" in options.part else ():
        work = partial(time_throughput, run, options.shape, kind, sizes_of(options), count)
        emit(**label, part="throughput", **with_steps(llm, work))


def measure_merge(llm: Any, options: Namespace, rounds: int = 7) -> dict[str, Any]:
    """Best times of merging over another adapter and of unmerging, beside copying as many bytes."""
    runner(llm)([[1000] * 4] * 2, [2, 2], [0, 1])
    best = time_switches(llm._open.executor, llm.adapters, rounds)
    layers, linears = SHAPES[options.shape]["num_hidden_layers"], linear_shapes(options.shape).values()
    weights = 2 * layers * sum(inputs * outputs for inputs, outputs in linears)
    adapter = 2 * layers * int(options.rank) * sum(inputs + outputs for inputs, outputs in linears)
    moved, bandwidth = (2 * weights + adapter) // world_size(), copy_bandwidth()
    return {
        **{name: round(value, 4) for name, value in best.items()},
        "bytes_moved": moved,
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "copy_ms": round(moved / bandwidth * 1e3, 4),
        "way": llm.model_info.merge_way,
    }


def time_switches(executor: Any, specs: Any, rounds: int) -> dict[str, float]:
    """Best ms of merging over another adapter and of unmerging: until the host goes on, and until the device is done.

    ``idle_ms`` is what asking whether an idle device is done takes by itself.
    """
    best: dict[str, float] = {}

    def note(name: str, seconds: float) -> None:
        best[name] = min(best.get(name, float("inf")), seconds * 1e3)

    for turn in range(2 * rounds):
        for name, spec in (("merge", specs[turn % 2]), ("unmerge", None)):
            synchronize()
            began = time.perf_counter()
            executor.switch(spec)
            note(f"{name}_host_ms", time.perf_counter() - began)
            synchronize()
            note(f"{name}_ms", time.perf_counter() - began)
        note("idle_ms", clocked(synchronize, synchronize))
    return best


def copy_bandwidth(rounds: int = 5) -> float:
    """Bytes read and written a second by copying a large tensor."""
    source = torch.zeros(1 << (30 if DEVICE == "cuda" else 24), dtype=torch.int16, device=DEVICE)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        synchronize()

    copy()
    return 2 * source.nbytes / min(clocked(copy, synchronize) for _ in range(rounds))


def main() -> None:
    parser = make_parser(__doc__, ("decode", "throughput", "merge", "prefill"))
    add_engine_options(parser)
    parser.add_argument("mode", choices=tuple(KINDS))
    parser.add_argument("--resident-rank", type=int, help="one more adapter, which no request asks for")
    parser.add_argument("--discard", action="store_true", help="remove the adapters at the end: they are large")
    options = parse(parser)
    count = {"base": 0, "lora": options.adapters, "merged": 2}[options.mode]
    ranks = ranks_of(options.rank, count)
    if options.resident_rank:
        ranks.append(options.resident_rank)
    merging = {"policy": "merge", "merge": "shadow"} if options.mode == "merged" else {}
    if follow(str(write_base(options.shape, options.folder)), **engine_options(options, ranks, **merging)):
        return
    paths = write_adapters(options.shape, options.folder, ranks, DEVICE)
    began = time.perf_counter()
    llm = start(options, paths, ranks, **merging)
    ready = time.perf_counter()
    first = runner(llm)([[1000] * 128], [1], None)
    info = llm.model_info
    label = {"engine": "ours", "mode": options.mode, "shape": options.shape, "rank": options.rank, "resident": count}
    if world_size() > 1:
        label["tensor_parallel_size"] = world_size()
    if options.resident_rank:
        label["resident_rank"] = options.resident_rank
        runner(llm)([[1000] * 16], [2], [count])
    emit(
        **label, part="start", seconds=round(ready - began, 1), first_token_s=round(ready - began + first, 1),
        attention=info.attention_backend, lora_kernels=info.lora_backend, kv_blocks=info.num_blocks,
    )  # fmt: skip
    measure(llm, options, label, max(count, 1))
    if "merge" in options.part and options.mode == "merged":
        emit(**label, part="merge", **measure_merge(llm, options))
    llm.close()
    for path in paths.values() if options.discard else ():
        shutil.rmtree(path)


if __name__ == "__main__":
    main()
