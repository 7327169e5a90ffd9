"""Are the answers exactly PEFT's? SmolLM2, the four demo adapters and the base, 32 mixed prompts x 64 greedy tokens.

    python scripts/check_exactness.py [--prompts 32] [--tokens 64] [--output DIR]

The engine answers all prompts in one mixed batch (float32, CPU, with chunked prefill and the prefix cache on), and
so does a patched PeftModel; PEFT answers each prompt alone with its adapter set. Tokens must be identical
(docs/architecture.md says what that means), logits within 1e-4 of their scale. Writes docs/results/exactness.json;
exits 1 when they are not.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import write_result
from demo_data.prompts import DEMO_PROMPTS
from demo_model import ensure_demo_model

from tests.oracle import LOGITS, Answer, PeftOracle, Recorder, common_prefix, is_tie

ADAPTERS = {name: Path(__file__).parent / "demo_adapters" / name for name in ("sql", "json", "sentiment", "style")}


def requests(count: int) -> list[tuple[str | None, str]]:
    """(adapter, message), adapters and base taking turns."""
    names = list(DEMO_PROMPTS)
    chosen = []
    for number in range(count):
        name = names[number % len(names)]
        texts = DEMO_PROMPTS[name]
        turn = number // len(names)
        # Beyond the texts of a name, a polite word makes another prompt of the first ones.
        text = texts[turn] if turn < len(texts) else f"Please. {texts[turn - len(texts)]}"
        chosen.append((None if name == "base" else name, text))
    return chosen


def compare(
    ours: list[list[int]], answers: list[Answer], oracle: PeftOracle, asked: list[tuple[str | None, list[int]]]
) -> dict[str, int]:
    """Tokens that agree, ties from which a request was compared again, and real differences."""
    counts = {"requests": len(ours), "tokens": 0, "identical_requests": 0, "ties": 0, "differences": 0}
    for tokens, answer, (adapter, prompt) in zip(ours, answers, asked, strict=True):
        counts["tokens"] += len(tokens)
        if tokens == answer.tokens:
            counts["identical_requests"] += 1
            continue
        first = next(i for i, (a, b) in enumerate(zip(tokens, answer.tokens, strict=True)) if a != b)
        for place in range(first, len(tokens)):
            logits = (
                answer.logits[first] if place == first else oracle.logits_after([*prompt, *tokens[:place]], adapter)
            )
            if int(logits.argmax()) != tokens[place]:
                counts["ties" if is_tie(logits, tokens[place]) else "differences"] += 1
    return counts


def worst_error(recorded: list[list[torch.Tensor]], answers: list[Answer], ours: list[list[int]]) -> float:
    """Largest logit difference up to each request's first different token, as a share of the logits' scale."""
    errors = []
    for logits, answer, tokens in zip(recorded, answers, ours, strict=True):
        same = min(common_prefix(tokens, answer.tokens) + 1, len(tokens))
        error = (torch.stack(logits[:same]) - answer.logits[:same]).abs().max() / answer.logits[:same].abs().max()
        errors.append(float(error))
    return max(errors)


def patched_answers(
    oracle: PeftOracle, asked: list[tuple[str | None, list[int]]], count: int
) -> tuple[list[list[int]], list[list[torch.Tensor]]]:
    """Tokens and the logits they were drawn from through ``peft_dist.patch(model)``: one left-padded batch."""
    import peft_dist

    longest = max(len(prompt) for _, prompt in asked)
    ids = torch.tensor([[2] * (longest - len(p)) + p for _, p in asked])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for _, p in asked])
    peft_dist.patch(oracle.model)
    try:
        with torch.no_grad():
            output: Any = oracle.model.generate(
                input_ids=ids, attention_mask=mask, adapter_names=[name or "__base__" for name, _ in asked],
                max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=-1,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
    finally:
        peft_dist.unpatch(oracle.model)
    return output.sequences[:, longest:].tolist(), [list(row) for row in torch.stack(output.logits, dim=1)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, help="folder for exactness.json (default: docs/results)")
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM

    from peft_dist import LLM, SamplingParams

    path = ensure_demo_model()
    greedy = SamplingParams(temperature=0.0, max_tokens=options.tokens, ignore_eos=True)
    with LLM(path, ADAPTERS, device="cpu", dtype="float32", num_blocks=1024, max_num_batched_tokens=256) as llm:
        asked = []
        for adapter, message in requests(options.prompts):
            chat = [{"role": "user", "content": message}]
            asked.append(
                (
                    adapter,
                    llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"],
                )
            )
        recorder = Recorder(llm)
        outputs = llm.generate([prompt for _, prompt in asked], greedy, [adapter for adapter, _ in asked])
        ours = [output.outputs[0].token_ids for output in outputs]
        recorded = [recorder.logits[output.request_id] for output in outputs]
    oracle = PeftOracle(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), ADAPTERS)
    answers = [oracle.answer(prompt, adapter, options.tokens) for adapter, prompt in asked]
    patched, patched_logits = patched_answers(oracle, asked, options.tokens)
    figures: dict[str, dict[str, float]] = {
        name: {
            **compare(tokens, answers, oracle, asked),
            "worst_logit_error_over_scale": worst_error(logits, answers, tokens),
        }
        for name, tokens, logits in (("LLM", ours, recorded), ("patch(model)", patched, patched_logits))
    }
    for name, value in figures.items():
        print(name, value)
    print("written to", write_result("exactness", figures, options.output))
    exact = all(
        not way["differences"]
        and way["ties"] * 10_000 <= way["tokens"]
        and way["worst_logit_error_over_scale"] <= LOGITS
        for way in figures.values()
    )
    return int(not exact)


if __name__ == "__main__":
    sys.exit(main())
