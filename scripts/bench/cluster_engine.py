"""What the replicas of the cluster benchmarks run: SmolLM2 on the CPU, or random weights of a GPU benchmark's shape."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from bench.gpu_engine import is_first_rank, room_for
from bench.gpu_workload import write_adapters, write_base
from bench.workload import write_adapters as write_small_adapters
from peft_dist.core.config import EngineConfig


def add_engine_options(parser: ArgumentParser) -> None:
    parser.add_argument("--shape", help="random weights of this shape (gpu_workload.py) instead of SmolLM2 on the CPU")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=JSON", help="more of EngineConfig")


def prepare(
    options: Namespace, folder: Path, num_adapters: int, resident: int | None = None, **more: Any
) -> tuple[EngineConfig, dict[str, Path]]:
    """What every replica runs, and adapters written to ``folder``, of which ``resident`` fit a device (None: all)."""
    ranks = [options.rank] * num_adapters
    folder.mkdir(parents=True, exist_ok=True)
    if options.shape:
        base = write_base(options.shape, folder)
        adapters = write_adapters(options.shape, folder, ranks, "auto") if is_first_rank() else {}
        more = {"load_format": "dummy", "dtype": "bfloat16", **more}
    else:
        from demo_model import ensure_demo_model

        base = ensure_demo_model()
        adapters = write_small_adapters(base, folder, options.rank, num_adapters)
        more = {"device": "cpu", "dtype": "float32", "num_threads": 1, "kv_cache_bytes": 2 << 30, **more}
    if resident:
        more["max_loras"] = resident
    more |= {name: json.loads(value) for name, _, value in (text.partition("=") for text in options.set)}
    if options.shape:
        # Counted in bfloat16.
        width = 2 if more["dtype"] == "float32" else 1
        more.setdefault("adapter_device_memory", width * room_for(options.shape, ranks[:resident]))
    return EngineConfig(str(base), **more), adapters
