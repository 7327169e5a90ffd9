"""Sixteen requests over eight adapters on a CPU: ours, PEFT and, where there is one, vLLM's CPU build.

    python scripts/bench/bench_cpu.py [--vllm-python PATH] [--rounds 3] [--threads 2] [--dtypes float32 bfloat16]

16 chats x 32 new tokens, greedy, SmolLM2-135M-Instruct, 8 random adapters of rank 8 on all seven linears. Every
round runs each contestant once, in turn, so that a slow moment of the machine falls on all; ratios are taken within a
round. PEFT's is `generate(adapter_names=...)` on the left-padded batch. Time to first token is that of the batch:
until every request has one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import write_result
from bench.workload import NEW_TOKENS, PROMPTS, write_adapters

Run = dict[str, float]


def run_ours(llm: Any, prompts: list[list[int]], names: list[str | None]) -> Run:
    from peft_dist import SamplingParams

    first = time_of(lambda: llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=1), names, use_tqdm=False))
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    whole = time_of(lambda: llm.generate(prompts, params, names, use_tqdm=False))
    return {"tokens_per_s": len(prompts) * NEW_TOKENS / whole, "first_token_s": first}


def run_peft(model: Any, prompts: list[list[int]], names: list[str | None]) -> Run:
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    extra = {"adapter_names": [name or "__base__" for name in names]} if any(names) else {}

    def generate(count: int) -> None:
        with torch.no_grad():
            model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                pad_token_id=2, **extra,
            )  # fmt: skip

    return {
        "first_token_s": time_of(lambda: generate(1)),
        "tokens_per_s": len(prompts) * NEW_TOKENS / time_of(lambda: generate(NEW_TOKENS)),
    }


def time_of(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(dtype: str, model_path: Path, adapters: dict[str, Path], rounds: int, threads: int) -> dict[str, list[Run]]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peft_dist import LLM

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    prompts = [
        tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in chats
    ]
    mixed: list[str | None] = [list(adapters)[i % len(adapters)] for i in range(len(prompts))]
    base: list[str | None] = [None] * len(prompts)
    llm = LLM(
        model_path,
        adapters,
        device="cpu",
        dtype=dtype,
        num_threads=threads,
        enable_prefix_caching=False,
        num_blocks=1024,
    )
    llm_base = LLM(
        model_path, device="cpu", dtype=dtype, num_threads=threads, enable_prefix_caching=False, num_blocks=1024
    )
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype)).eval()
    plain = run_peft(model, prompts, base)  # Before PEFT puts its layers in.
    peft: Any = None
    for name, path in adapters.items():
        if peft is None:
            peft = PeftModel.from_pretrained(model, str(path), adapter_name=name)
        else:
            peft.load_adapter(str(path), name)
    peft.eval()
    contestants = {
        "ours, 8 adapters": lambda: run_ours(llm, prompts, mixed),
        "ours, base only": lambda: run_ours(llm_base, prompts, base),
        "PEFT, 8 adapters": lambda: run_peft(peft, prompts, mixed),
    }
    for warm_up in contestants.values():
        warm_up()
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            runs[name].append(contestant())
    runs["transformers, base only"] = [plain]
    return runs


def run_vllm(
    python: str, dtype: str, model_path: Path, adapters: dict[str, Path], rounds: int, threads: int
) -> dict[str, list[Run]]:
    script = Path(__file__).with_name("vllm_cpu.py")
    request = {
        "dtype": dtype,
        "model": str(model_path),
        "adapters": {n: str(p) for n, p in adapters.items()},
        "rounds": rounds,
    }
    done = subprocess.run(
        [python, str(script)], input=json.dumps(request), text=True, stdout=subprocess.PIPE, check=True,
        env=vllm_environment(threads),
    )  # fmt: skip
    return json.loads(done.stdout.strip().splitlines()[-1])


def vllm_environment(threads: int) -> dict[str, str]:
    import os

    return {
        **os.environ, "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "2",
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip


def ratios(runs: dict[str, list[Run]]) -> dict[str, float]:
    """Medians over the rounds of ratios within a round (vLLM has a process, and so rounds, of its own)."""
    mixed = [run["tokens_per_s"] for run in runs["ours, 8 adapters"]]
    found = {
        "ours / PEFT, 8 adapters": paired(mixed, [run["tokens_per_s"] for run in runs["PEFT, 8 adapters"]]),
        "ours 8 adapters / ours base": paired(mixed, [run["tokens_per_s"] for run in runs["ours, base only"]]),
    }
    if "vLLM, 8 adapters" in runs:
        other = runs["vLLM, 8 adapters"]
        found["ours / vLLM, 8 adapters"] = statistics.median(mixed) / statistics.median(
            r["tokens_per_s"] for r in other
        )
        first = statistics.median(run["first_token_s"] for run in runs["ours, 8 adapters"])
        found["first token, ours / vLLM"] = first / statistics.median(r["first_token_s"] for r in other)
    return {name: round(value, 3) for name, value in found.items()}


def paired(ours: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="Python of an environment that has vllm-cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="another Llama-like model folder (default: the demo's SmolLM2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="folder for bench_cpu.json (default: docs/results)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from demo_model import ensure_demo_model

    model_path = options.model or ensure_demo_model()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        adapters = write_adapters(model_path, Path(folder))
        for dtype in options.dtypes:
            runs = measure(dtype, model_path, adapters, options.rounds, options.threads)
            if options.vllm_python:
                runs |= run_vllm(options.vllm_python, dtype, model_path, adapters, options.rounds, options.threads)
            figures[dtype] = {"runs": runs, "ratios": ratios(runs)}
            show(dtype, figures[dtype])
    print("written to", write_result("bench_cpu", figures, options.output))


def show(dtype: str, figures: dict[str, Any]) -> None:
    print(f"\n{dtype}: median of {len(figures['runs']['ours, 8 adapters'])} rounds")
    for name, runs in figures["runs"].items():
        rate, first = (statistics.median(run[key] for run in runs) for key in ("tokens_per_s", "first_token_s"))
        print(f"  {name:26} {rate:7.1f} tokens/s   first token {first:.2f} s")
    for name, value in figures["ratios"].items():
        print(f"  {name:38} {value:.2f} x")


if __name__ == "__main__":
    main()
