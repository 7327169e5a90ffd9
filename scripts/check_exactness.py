"""Are the answers exactly PEFT's? SmolLM2, the four demo adapters and the base, 32 mixed prompts x 64 greedy tokens.

    python scripts/check_exactness.py [--prompts 32] [--tokens 64] [--output DIR]

The engine answers all prompts in one mixed batch (float32, CPU, with chunked prefill and the prefix cache on), and
so does a patched PeftModel; PEFT answers each prompt alone with its adapter set. With both ways of merging (shadow,
host) the engine answers them again in batches of the adapter that is merged, another one by lot in each step, and once
more with everybody else in those batches (corrected). Tokens must be identical
(docs/architecture.md says what that means), logits within 1e-4 of their scale. Writes docs/results/exactness.json;
exits 1 when they are not.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import write_result
from demo_data.prompts import DEMO_PROMPTS
from demo_model import ensure_demo_model

from peft_dist import LLM, SamplingParams
from peft_dist.policy.batching import BASE, Choice, QueueState
from tests.e2e.test_policies import AnyMode
from tests.oracle import LOGITS, Answer, PeftOracle, Recorder, common_prefix, is_tie

ADAPTERS = {name: Path(__file__).parent / "demo_adapters" / name for name in ("sql", "json", "sentiment", "style")}
ENGINE: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_blocks": 1024, "max_num_batched_tokens": 256}


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


class MergedByLot(AnyMode):
    """Every step that can be is merged with an adapter by lot; the base's requests run in steps of their own."""

    def __init__(self, *, corrected: bool) -> None:
        super().__init__(0)
        self._corrected = corrected

    def choose(self, state: QueueState) -> Choice:
        runnable = [c for c in state.candidates if c.num_new_tokens and c.is_resident]
        merged = self.rng.choice(sorted({c.adapter for c in runnable}) or [BASE])
        if not self._corrected or merged == BASE:
            runnable = [c for c in runnable if c.adapter == merged]
        # First those that make it a merged batch.
        runnable.sort(key=lambda c: c.adapter != merged)
        return Choice(None if merged == BASE else merged, runnable[: state.max_num_seqs], "lot")


def engine_answers(
    llm: LLM, asked: list[tuple[str | None, list[int]]], count: int
) -> tuple[list[list[int]], list[list[torch.Tensor]]]:
    """Tokens and the logits they were drawn from, all prompts at once."""
    recorder = Recorder(llm)
    greedy = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    outputs = llm.generate([prompt for _, prompt in asked], greedy, [adapter for adapter, _ in asked])
    return [out.outputs[0].token_ids for out in outputs], [recorder.logits[out.request_id] for out in outputs]


def merged_answers(
    way: str, corrected: bool, asked: list[tuple[str | None, list[int]]], count: int
) -> tuple[list[list[int]], list[list[torch.Tensor]], dict[str, int]]:
    """``engine_answers`` by merged steps, and how many of those there were."""
    with LLM(ensure_demo_model(), ADAPTERS, merge=way, **ENGINE) as llm:
        engine = llm._open.engine
        engine.scheduler.policy = MergedByLot(corrected=corrected)
        answers = engine_answers(llm, asked, count)
        return *answers, {"merged_steps": engine.num_merged_steps, "switches": engine.num_switches}


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
    with LLM(ensure_demo_model(), ADAPTERS, **ENGINE) as llm:
        asked = []
        for adapter, message in requests(options.prompts):
            chat = [{"role": "user", "content": message}]
            tokens = llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
            asked.append((adapter, tokens["input_ids"]))
        found: dict[str, Any] = {"LLM": (*engine_answers(llm, asked, options.tokens), {})}
    for way, corrected in itertools.product(("shadow", "host"), (False, True)):
        name = f"LLM, merged ({way}){', others corrected' if corrected else ''}"
        found[name] = merged_answers(way, corrected, asked, options.tokens)
    base = AutoModelForCausalLM.from_pretrained(ensure_demo_model(), dtype=torch.float32)
    oracle = PeftOracle(base, ADAPTERS)
    answers = [oracle.answer(prompt, adapter, options.tokens) for adapter, prompt in asked]
    found["patch(model)"] = (*patched_answers(oracle, asked, options.tokens), {})
    figures: dict[str, dict[str, float]] = {
        name: {
            **compare(tokens, answers, oracle, asked),
            "worst_logit_error_over_scale": worst_error(logits, answers, tokens),
            **steps,
        }
        for name, (tokens, logits, steps) in found.items()
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
