"""vLLM's multi-LoRA decode, prefill and throughput on one GPU; to be run by a Python that has vLLM.

    python scripts/bench/peer_vllm.py base|lora|tuned [--part decode throughput] [--batches 1 8] [--kinds distinct]

base: without LoRA. lora: with room for the adapters. tuned: as lora, with vLLM's opt-in flags for LoRA (kernels
specialised by the number of active adapters, and adapters beside the base on a second stream). The prompts, the
popularity and the clock are gpu_workload.py's. One JSON line a measurement.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.gpu_options import kinds_of, make_parser, parse, sizes_of
from bench.gpu_workload import (
    MAX_MODEL_LEN,
    NEW_TOKENS,
    PREFILL,
    SEATS,
    Run,
    clocked,
    emit,
    ranks_of,
    time_decode,
    time_prefill,
    time_throughput,
    write_adapters,
    write_base,
)

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # All-reduces by multicast, which not every host allows: its own, and NCCL's, stay.
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}


def start(mode: str, options: Namespace) -> Any:
    """vLLM's engine for the random model."""
    from vllm import LLM

    arguments: dict[str, Any] = {
        "model": str(write_base(options.shape, options.folder)), "load_format": "dummy", "skip_tokenizer_init": True,
        "dtype": "bfloat16", "max_model_len": MAX_MODEL_LEN, "gpu_memory_utilization": options.memory,
        "enable_prefix_caching": False, "max_num_seqs": SEATS if options.ranks == 1 else 128, "disable_log_stats": True,
        "tensor_parallel_size": options.ranks,
    }  # fmt: skip
    if mode != "base":
        highest = max(ranks_of(options.rank, options.adapters))
        arguments |= {"enable_lora": True, "max_loras": options.adapters, "max_lora_rank": highest}
    if mode == "tuned":
        arguments["specialize_active_lora"] = True
    return LLM(**arguments)


def runner(llm: Any, paths: dict[str, Path]) -> Run:
    import torch
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    known = [LoRARequest(name, number + 1, str(path)) for number, (name, path) in enumerate(paths.items())]

    def run(prompts: list[list[int]], counts: list[int], adapters: list[int] | None) -> float:
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in counts]
        lora = None if adapters is None else [known[i] for i in adapters]

        def generate() -> None:
            outputs = llm.generate(asked, params, lora_request=lora, use_tqdm=False)
            drawn = [len(output.outputs[0].token_ids) for output in outputs]
            assert drawn == counts, "answers of another length than asked"

        return clocked(generate, synchronize)

    return run


def main() -> None:
    parser = make_parser(__doc__, ("decode", "throughput", "prefill"))
    parser.add_argument("mode", choices=("base", "lora", "tuned"))
    parser.add_argument("--memory", type=float, default=0.6, help="share of each device's memory")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs of the engine")
    options = parse(parser)
    os.environ.update(_ENVIRONMENT)
    if options.mode == "tuned":
        os.environ["VLLM_LORA_ENABLE_DUAL_STREAM"] = "1"
    label: dict[str, Any] = {"engine": "vllm", "mode": options.mode}
    if options.ranks > 1:
        label |= {"shape": options.shape, "tensor_parallel_size": options.ranks}
    began = time.perf_counter()
    ranks = ranks_of(options.rank, options.adapters) if options.mode != "base" else []
    # In a process of their own, so that this one's CUDA context does not exist when vLLM starts its engine.
    made = (options.shape, options.folder, ranks)
    writer = multiprocessing.get_context("spawn").Process(target=write_adapters, args=(*made, "auto"))
    writer.start()
    writer.join()
    paths = write_adapters(*made)
    written = time.perf_counter()
    run = runner(start(options.mode, options), paths)
    import vllm

    emit(**label, part="start", seconds=round(time.perf_counter() - written, 1), version=vllm.__version__,
         adapters_written_s=round(written - began, 1))  # fmt: skip
    label["rank"] = options.rank
    kinds = kinds_of(options, ("none",) if options.mode == "base" else ("none", "same", "zipf", "distinct", "eight"))
    for kind in kinds if "decode" in options.part else ():
        for batch in options.batches:
            figures = time_decode(run, options.shape, kind, batch, options.adapters, options.new_tokens or NEW_TOKENS)
            emit(**label, part="decode", **figures)
    for kind in kinds if "prefill" in options.part else ():
        figures = time_prefill(run, options.shape, kind, *(4, 16) if options.tiny else PREFILL, options.adapters)
        emit(**label, part="prefill", **figures)
    for kind in kinds if "throughput" in options.part else ():
        emit(**label, part="throughput",
             **time_throughput(run, options.shape, kind, sizes_of(options), options.adapters))  # fmt: skip


if __name__ == "__main__":
    main()
