"""Our engine for the GPU benchmarks: how it is started, and asked."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu_workload import MAX_MODEL_LEN, SEATS, SHAPES, STEP_TOKENS, Run, clocked, linear_shapes, write_base

PAGE_ROWS = 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def add_engine_options(parser: ArgumentParser) -> None:
    parser.add_argument("--memory", type=float, default=0.6, help="share of the device's memory")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=JSON", help="more of EngineConfig, as in enforce_eager=true"
    )


def row_bytes(shape: str) -> int:
    """Bytes of a rank row in every module that can be adapted: the linears, the head and the embedding."""
    sizes = SHAPES[shape]
    of_layer = sum(inputs + outputs for inputs, outputs in linear_shapes(shape).values())
    return 2 * (sizes["num_hidden_layers"] * of_layer + 2 * (sizes["hidden_size"] + sizes["vocab_size"]))


def room_for(shape: str, ranks: Sequence[int]) -> int:
    """Bytes on the device for adapters of these ranks."""
    return sum(-(-rank // PAGE_ROWS) * PAGE_ROWS for rank in ranks) * row_bytes(shape)


def engine_options(options: Namespace, ranks: Sequence[int], **more: Any) -> dict[str, Any]:
    """Fields of ``EngineConfig``: vLLM's settings in peer_vllm.py, room for adapters of ``ranks``, nothing merged."""
    found: dict[str, Any] = {
        "load_format": "dummy", "dtype": "bfloat16", "max_num_seqs": SEATS, "enable_prefix_caching": False,
        "max_model_len": MAX_MODEL_LEN, "gpu_memory_utilization": options.memory, "policy": "fcfs", "merge": "off",
    }  # fmt: skip
    if ranks:
        found |= {"max_loras": len(ranks), "adapter_device_memory": room_for(options.shape, ranks)}
    if DEVICE == "cuda":
        # Said here for the other ranks.
        found["max_num_batched_tokens"] = STEP_TOKENS
    if world_size() > 1:
        found["tensor_parallel_size"] = world_size()
    if options.tiny:
        found |= {"num_blocks": 2048, "max_model_len": 1024, "num_threads": 1}
    return found | more | {name: json.loads(value) for name, _, value in (text.partition("=") for text in options.set)}


def world_size() -> int:
    """Processes of this replica, one for each GPU: what torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this process drives the replica: others ``follow``."""
    return not int(os.environ.get("RANK", "0"))


def follow(model: str, **options: Any) -> bool:
    """Of every rank but the first: do what that does, until it ends. False for the first, or for one alone.

    ``options``: Of ``EngineConfig``, as the first one's.
    """
    if is_first_rank():
        return False
    from peft_dist.core.config import EngineConfig
    from peft_dist.runner.replica import build_replica

    build_replica(EngineConfig(model, **options)).follow()
    return True


def start(options: Namespace, adapters: dict[str, Path], ranks: Sequence[int], **more: Any) -> Any:
    """An ``LLM`` of the random model, or of the folder ``model``, with ``adapters``."""
    from peft_dist import LLM

    more.setdefault("model", write_base(options.shape, options.folder))
    return LLM(adapters=adapters, **engine_options(options, ranks, **more))


def runner(llm: Any) -> Run:
    """``LLM.generate`` on the clock; adapters by their number in ``llm.adapters``."""
    from peft_dist import SamplingParams

    names = [spec.name for spec in llm.adapters]

    def run(prompts: list[list[int]], counts: list[int], adapters: list[int] | None) -> float:
        params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in counts]
        asked = None if adapters is None else [names[i] for i in adapters]

        def generate() -> None:
            outputs = llm.generate(prompts, params, asked, use_tqdm=False)
            drawn = [len(output.outputs[0].token_ids) for output in outputs]
            assert drawn == counts, "answers of another length than asked"

        return clocked(generate, synchronize)

    return run
