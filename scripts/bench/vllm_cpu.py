"""vLLM's CPU build on the workload of bench_cpu.py; run by it, in vLLM's own environment.

Reads a JSON request from stdin, writes one JSON line to stdout: runs by contestant.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from workload import NEW_TOKENS, NUM_ADAPTERS, PROMPTS, RANK


def main() -> None:
    # Whatever vLLM prints must not stand between our caller and the result.
    result = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.read())
    runs = {}
    for name, lora in (("vLLM, base only", False), ("vLLM, 8 adapters", True)):
        runs[name] = contestant(request, lora)
    result.write(json.dumps(runs) + "\n")
    result.flush()


def contestant(request: dict, lora: bool) -> list[dict[str, float]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"enable_lora": True, "max_loras": NUM_ADAPTERS, "max_lora_rank": RANK} if lora else {}
    llm = LLM(
        request["model"], dtype=request["dtype"], max_model_len=2048, max_num_seqs=16, enable_prefix_caching=False,
        disable_log_stats=True, **options,
    )  # fmt: skip
    tokenizer = llm.get_tokenizer()
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    prompts = [
        {
            "prompt_token_ids": tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        }
        for c in chats
    ]
    loras = None
    if lora:
        adapters = list(request["adapters"].items())
        known = [LoRARequest(name, i + 1, path) for i, (name, path) in enumerate(adapters)]
        loras = [known[i % len(known)] for i in range(len(prompts))]

    def generate(count: int) -> float:
        start = time.perf_counter()
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
        return time.perf_counter() - start

    generate(NEW_TOKENS)
    runs = []
    for _ in range(request["rounds"]):
        first = generate(1)
        runs.append({"first_token_s": first, "tokens_per_s": len(prompts) * NEW_TOKENS / generate(NEW_TOKENS)})
    return runs


if __name__ == "__main__":
    main()
