"""Answer a file of prompts, each through its own adapter, with one patched PEFT model on every process.

    accelerate launch --num_processes 2 scripts/examples/batch_generate.py
    accelerate launch --num_processes 2 scripts/examples/batch_generate.py --model FOLDER --adapter sql=FOLDER \\
        --prompts prompts.jsonl --max-new-tokens 64

Each line of the prompts file is {"adapter": "sql", "prompt": "text, or a list of token ids"}; the adapter
"__base__" is the base model. Answers are printed in the order of the prompts, one JSON object a line.

`accelerate launch` quietly starts a single process on a machine with fewer than two GPUs. This script asks for
`--processes` (2 unless told otherwise) and then starts them itself, over gloo on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_dist

SCRIPTS = Path(__file__).resolve().parents[1]
QUESTIONS = [
    "How many orders were placed in March?",
    "I loved every minute of this film.",
    "What is the capital of France?",
    "Why is the sky blue?",
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Batch generation with many adapters on several processes.")
    parser.add_argument("--model", help="folder or hub id of the base model (default: the demo model)")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH", help="repeatable")
    parser.add_argument("--prompts", type=Path, help="JSON lines file (default: a few questions to every adapter)")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--processes", type=int, default=2, help="processes that have to take part")
    return parser.parse_args()


def ensure_processes(wanted: int) -> PartialState:
    """Join a world of ``wanted`` processes, starting it when the launcher gave this process no companions."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1 != wanted:
        print(f"batch_generate: accelerate started one process; starting {wanted}", file=sys.stderr, flush=True)
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(wanted)]
        port = ["--main_process_port", "0"]
        os.execv(sys.executable, [sys.executable, *launch, *port, __file__, *sys.argv[1:]])
    if started != wanted:
        raise SystemExit(f"batch_generate: {started} processes were started but {wanted} are wanted: give --processes")
    state = PartialState(cpu=torch.cuda.device_count() < wanted)
    if state.num_processes != wanted:
        raise SystemExit(f"batch_generate: the world has {state.num_processes} processes, {wanted} are wanted")
    return state


def choose_adapters(given: list[str]) -> dict[str, str]:
    """Adapter folders by name; those of the demo when none are given."""
    for item in given:
        if "=" not in item:
            raise SystemExit(f"batch_generate: --adapter {item!r} must be NAME=PATH")
    if given:
        return dict(item.split("=", 1) for item in given)
    return {path.parent.name: str(path.parent) for path in sorted(SCRIPTS.glob("demo_adapters/*/adapter_config.json"))}


def read_prompts(path: Path, known: set[str]) -> list[dict[str, Any]]:
    """The lines of a file of prompts. Raises SystemExit, which names the line, for what is no prompt of an adapter."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            name, _ = row["adapter"], row["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f'batch_generate: line {number} of {path} must be {{"adapter": NAME, "prompt": TEXT}}: {error!r}'
            ) from error
        if name not in known:
            there = ", ".join(sorted(known))
            raise SystemExit(f"batch_generate: line {number} of {path} names {name!r}: there is {there}")
        rows.append(row)
    return rows


def default_model() -> str:
    sys.path.insert(0, str(SCRIPTS))
    from demo_model import ensure_demo_model

    return str(ensure_demo_model())


def load(model: str, adapters: dict[str, str], device: torch.device) -> PeftModel:
    """The base model with all adapters, patched."""
    base = AutoModelForCausalLM.from_pretrained(model).to(device)
    (first, path), *others = adapters.items()
    peft_model = PeftModel.from_pretrained(base, path, adapter_name=first)
    for name, other in others:
        peft_model.load_adapter(other, adapter_name=name)
    return peft_dist.patch(peft_model.eval())


def encode(prompts: list[Any], tokenizer: Any) -> list[list[int]]:
    """Token ids of each prompt; texts become chat messages when the model has a chat template."""
    ids = []
    for prompt in prompts:
        if isinstance(prompt, str) and tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids.append(prompt if isinstance(prompt, list) else tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return ids


def answer(model: PeftModel, rows: list[dict[str, Any]], tokenizer: Any, limit: int) -> list[dict[str, Any]]:
    """One selective batch over this process's share, padded on the left."""
    if not rows:
        return []
    ids = encode([row["prompt"] for row in rows], tokenizer)
    longest = max(map(len, ids))
    inputs = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=model.device)
    end = model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    tokens = model.generate(
        input_ids=inputs,
        attention_mask=mask,
        adapter_names=[row["adapter"] for row in rows],
        max_new_tokens=limit,
        do_sample=False,
        pad_token_id=min(ends - {None}, default=0),
    )[:, longest:].tolist()
    return [_answer_of(row, new, ends, tokenizer) for row, new in zip(rows, tokens, strict=True)]


def _answer_of(row: dict[str, Any], tokens: list[int], ends: set[int | None], tokenizer: Any) -> dict[str, Any]:
    length = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    found = {"adapter": row["adapter"], "prompt": row["prompt"], "token_ids": tokens[:length]}
    return found | ({"text": tokenizer.decode(tokens[:length])} if tokenizer else {})


def main() -> None:
    arguments = parse_arguments()
    state = ensure_processes(arguments.processes)
    with state.main_process_first():
        folder = arguments.model or default_model()
    adapters = choose_adapters(arguments.adapter)
    if not adapters:
        raise SystemExit("batch_generate: no adapters: give --adapter NAME=PATH")
    texts = (
        read_prompts(arguments.prompts, {*adapters, "__base__"})
        if arguments.prompts
        else [{"adapter": name, "prompt": question} for question in QUESTIONS for name in (*adapters, "__base__")]
    )
    has_tokenizer = any(isinstance(row["prompt"], str) for row in texts)
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    model = load(folder, adapters, state.device)
    with state.split_between_processes(texts) as share:
        answers = gather_object(answer(model, share, tokenizer, arguments.max_new_tokens))
    if state.is_main_process:
        for found in answers:
            print(json.dumps(found), flush=True)
    state.destroy_process_group()


if __name__ == "__main__":
    main()
