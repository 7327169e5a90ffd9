"""Milliseconds to load one adapter: ours with all its checks, PEFT's load_adapter, and the bare safetensors read.

    python scripts/bench/bench_adapter_load.py [--rounds 20] [--rank 8] [--threads 1]

A random adapter on all seven linears of every layer of SmolLM2-135M-Instruct (210 modules; 9.8 MB at rank 8), from
the page cache. Every round runs each contestant once, in turn. The time of the processor is reported beside that of
the clock, because it hardly depends on what else the machine does. Besides, what registering an adapter that was read
and checked takes on the engine's thread of a replica: the first, which puts LoRA layers around 210 linears, and the
next. Writes docs/results/adapter_load.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from demo_model import ensure_demo_model

from bench.report import write_result

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def prepare(folder: Path, rank: int) -> Any:
    """Save a random adapter with PEFT and return a PeftModel that has it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ensure_demo_model(), dtype=torch.float32)
    peft_model = get_peft_model(model, LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False))
    peft_model.save_pretrained(folder)
    return peft_model


def contestants(folder: Path, peft_model: Any) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """What to time, and what to do after it untimed, by name."""
    from safetensors.torch import load_file

    from peft_dist.runner.adapter_modules import describe_modules
    from peft_dist.runner.adapter_tensors import load_adapter

    modules = describe_modules(peft_model)
    return {
        "ours": (lambda: load_adapter("bench", folder, modules), lambda: None),
        "safetensors": (lambda: load_file(folder / "adapter_model.safetensors"), lambda: None),
        "peft": (
            lambda: peft_model.load_adapter(folder, adapter_name="bench"),
            lambda: peft_model.delete_adapter("bench"),
        ),
    }


def registrations(folder: Path, rank: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of the first registration of a replica, and of the second."""
    from bench.workload import write_adapters
    from peft_dist.core.config import EngineConfig
    from peft_dist.runner.background import call_in_time
    from peft_dist.runner.replica import build_replica

    model = ensure_demo_model()
    adapters = write_adapters(model, folder, rank, 2)
    taken: dict[str, list[float]] = {"first": [], "next": []}
    for _ in range(rounds):
        replica = build_replica(EngineConfig(str(model), device="cpu", dtype="float32", num_threads=1, num_blocks=64))
        for (name, path), times in zip(adapters.items(), taken.values(), strict=True):
            # As a worker has it done, on a thread of its own.
            spec = call_in_time("fetcher", partial(replica.inspect_adapter, name, path), None)
            start = time.perf_counter()
            replica.register_adapter(spec)
            times.append(time.perf_counter() - start)
        replica.close()
        del replica
    return _milliseconds(taken, statistics.median)


def measure(rounds: int, rank: int) -> dict[str, Any]:
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        registered = registrations(folder, rank, min(rounds, 5))
        running = contestants(folder, prepare(folder, rank))
        size = (folder / "adapter_model.safetensors").stat().st_size
        for number in range(rounds + 1):
            for name, (work, clean) in running.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                work()
                elapsed, cpu_elapsed = time.perf_counter() - start, time.process_time() - cpu_start
                clean()
                if number:  # the first round warms up
                    wall.setdefault(name, []).append(elapsed)
                    cpu.setdefault(name, []).append(cpu_elapsed)
    return {
        "rank": rank,
        "modules": 30 * len(TARGETS),
        "file_bytes": size,
        "rounds": rounds,
        "median_ms": _milliseconds(wall, statistics.median),
        "min_ms": _milliseconds(wall, min),
        "median_cpu_ms": _milliseconds(cpu, statistics.median),
        "registering_on_the_engines_thread_ms": registered,
    }


def _milliseconds(seconds: dict[str, list[float]], of: Callable[[list[float]], float]) -> dict[str, float]:
    return {name: round(of(values) * 1e3, 2) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=None, help="folder of the result (docs/results)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    figures = measure(options.rounds, options.rank)
    path = write_result("adapter_load", figures, options.output)
    for name, value in figures["median_ms"].items():
        best, cpu = figures["min_ms"][name], figures["median_cpu_ms"][name]
        print(f"{name:12} {value:8.2f} ms median, {best:8.2f} ms best, {cpu:8.2f} ms of processor time")
    print("registering, on the engine's thread:", figures["registering_on_the_engines_thread_ms"])
    print(f"written to {path}")


if __name__ == "__main__":
    main()
