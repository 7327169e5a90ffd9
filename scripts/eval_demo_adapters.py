"""Score the base model and the demo adapters on held-out rows with greedy decoding.

Usage: python scripts/eval_demo_adapters.py [sql json sentiment style] [--adapters DIR] [--show N]
Writes scores.json beside each adapter and puts the scores into its model card.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from demo_data.adapters import SPECS, AdapterSpec
from demo_data.card import environment, write_card
from demo_data.rows import Row
from demo_data.tasks import TASKS, training_and_heldout
from demo_model import DemoModelError, ensure_demo_model
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

ADAPTERS = Path(__file__).resolve().parent / "demo_adapters"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@torch.inference_mode()
def generate(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, messages: Sequence[str], tokens: int, batch: int
) -> list[str]:
    """Return the model's greedy answer to each user message."""
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": m}], add_generation_prompt=True, tokenize=False)
        for m in messages
    ]
    # Prompts of one length share a batch, so little of it is padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer(
            [prompts[index] for index in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text.strip()
    return answers


def count_right(task: str, rows: Sequence[Row], answers: Sequence[str]) -> int:
    """Return how many answers the task's judge accepts."""
    return sum(TASKS[task].judge(text, row.answer) for row, text in zip(rows, answers, strict=True))


def evaluate(spec: AdapterSpec, folder: Path, base: Path, dtype: str, batch: int, show: int) -> bool:
    """Score base and adapter, record the scores, and tell whether the adapter and the base meet their limits."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype]).eval()
    _, rows = training_and_heldout(spec.name, spec.rows)
    messages = [row.user for row in rows]
    base_answers = generate(model, tokenizer, messages, spec.max_new_tokens, batch)
    adapted = PeftModel.from_pretrained(model, folder).eval()
    answers = generate(adapted, tokenizer, messages, spec.max_new_tokens, batch)
    scores: dict[str, object] = {"task": spec.name, "rule": TASKS[spec.name].rule, "rows": len(rows), "dtype": dtype}
    shares: dict[str, float] = {}
    for who, texts in (("base", base_answers), ("adapter", answers)):
        right = count_right(spec.name, rows, texts)
        shares[who] = right / len(rows)
        scores[who] = {"right": right, "score": round(shares[who], 4)}
    scores |= environment()
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    write_card(spec, folder)
    wrong = [i for i, row in enumerate(rows) if not TASKS[spec.name].judge(answers[i], row.answer)]
    for index in (wrong + [i for i in range(len(rows)) if i not in set(wrong)])[:show]:
        print(f"--- {rows[index].user}\nexpected: {rows[index].answer}")
        print(f"base:     {base_answers[index]}\nadapter:  {answers[index]}")
    met = shares["adapter"] >= spec.target_score and shares["base"] < spec.base_limit
    print(
        f"{spec.name}: base {shares['base']:.1%}, adapter {shares['adapter']:.1%} of {len(rows)} held-out rows", end=""
    )
    print("" if met else f" (wanted: base below {spec.base_limit:.0%}, adapter at least {spec.target_score:.0%})")
    return met


def main(arguments: Sequence[str] | None = None) -> int:
    """Score the named adapters, all four by default; return 1 when one misses its limits."""
    parser = argparse.ArgumentParser(description="Score the base model and the demo adapters on held-out rows.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"adapters to score: {', '.join(SPECS)} (default all)")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="folder with one folder for each adapter")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="arithmetic (default bfloat16)")
    parser.add_argument("--batch", type=int, default=40, help="prompts generated together (default 40)")
    parser.add_argument("--show", type=int, default=0, help="print this many rows of each task, wrong ones first")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(SPECS))
    if unknown:
        parser.error(f"unknown adapter {', '.join(unknown)}; choose from {', '.join(SPECS)}")
    names = options.names or list(SPECS)
    for name in names:
        if not (options.adapters / name / "adapter_config.json").is_file():
            parser.error(f"no adapter in {options.adapters / name}; run scripts/train_demo_adapters.py {name} first")
    try:
        base = ensure_demo_model()
    except DemoModelError as error:
        print(f"eval_demo_adapters: {error}", file=sys.stderr)
        return 1
    met = [
        evaluate(SPECS[name], options.adapters / name, base, options.dtype, options.batch, options.show)
        for name in names
    ]
    return 0 if all(met) else 1


if __name__ == "__main__":
    raise SystemExit(main())
