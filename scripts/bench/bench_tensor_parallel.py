"""Seconds of a decode step of one replica: on one device, or split over as many as it is launched for.

python -m scripts.bench.bench_tensor_parallel MODEL
torchrun --nproc-per-node 2 -m scripts.bench.bench_tensor_parallel MODEL

Writes docs/results/tensor_parallel_SIZE[_NAME].json. ``--shape 8b`` writes a folder MODEL of that shape first, for
``--load-format dummy``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.gpu_engine import follow, world_size
from bench.gpu_workload import write_base
from bench.report import write_result
from peft_dist import LLM, SamplingParams

_PROMPT_TOKENS = 16


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model")
    options.add_argument("--dtype", default="auto")
    options.add_argument("--device", default="auto")
    options.add_argument("--load-format", default="auto")
    options.add_argument("--enforce-eager", action="store_true")
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128])
    options.add_argument("--adapters", type=int, default=8, help="0 measures the base alone")
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--shape", help="write MODEL/base-SHAPE (gpu_workload.py) and measure that")
    options.add_argument("--name", default="", help="of the result file: tensor_parallel_SIZE_NAME.json")
    options.add_argument("--output", type=Path, help="folder for the result (default: docs/results)")
    asked = options.parse_args()
    size = world_size()
    if asked.shape:
        asked.model = str(write_base(asked.shape, Path(asked.model)))
    engine: dict[str, Any] = {
        "dtype": asked.dtype,
        "device": asked.device,
        "load_format": asked.load_format,
        "enforce_eager": asked.enforce_eager,
        "tensor_parallel_size": size,
        "policy": "fcfs",
        "max_model_len": _PROMPT_TOKENS + asked.tokens,
        "max_num_seqs": max(asked.batches),
        "enable_prefix_caching": False,
    }
    if follow(asked.model, **engine):
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = make_adapters(asked.model, Path(folder), asked.adapters, asked.rank)
        with LLM(asked.model, paths, **engine) as llm:
            print(
                f"{size} x {llm.model_info.device}, {llm.model_info.dtype}, {len(paths)} adapters of rank {asked.rank}"
            )
            steps = {}
            for batch in asked.batches:
                steps[batch] = round(1e3 * seconds_of_step(llm, batch, list(paths), asked.tokens), 3)
                print(f"{batch:5d} sequences: {steps[batch]:8.3f} ms a step")
    left_out = ("output", "model") if asked.shape else ("output",)
    settings = {key: str(value) for key, value in vars(asked).items() if key not in left_out}
    name = "_".join(["tensor_parallel", str(size), *filter(None, [asked.name])])
    print(write_result(name, {"ranks": size, "settings": settings, "step_ms": steps}, asked.output))


def make_adapters(model: str, folder: Path, number: int, rank: int) -> dict[str, Path]:
    """Random ones for all linear layers of the decoder."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny_models import random_adapter

    with init_empty_weights():
        shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return {
        f"a{i}": random_adapter(
            shapes, folder / f"a{i}", rank, 2.0 * rank, targets, seed=i, dtype=torch.bfloat16, strength=0.05
        )
        for i in range(number)
    }


def seconds_of_step(llm: LLM, batch: int, adapters: list[str], tokens: int) -> float:
    """Of a decode: the difference between many tokens and one, best of three."""
    prompts = [[5 + (7 * k + i) % 50 for i in range(_PROMPT_TOKENS)] for k in range(batch)]
    names = [adapters[k % len(adapters)] if adapters else None for k in range(batch)]

    def run(count: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        began = time.perf_counter()
        llm.generate(prompts, params, names, use_tqdm=False)
        return time.perf_counter() - began

    run(2)
    return min(run(tokens) - run(1) for _ in range(3)) / (tokens - 1)


if __name__ == "__main__":
    main()
