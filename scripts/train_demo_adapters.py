"""Train the demo LoRA adapters for SmolLM2-135M-Instruct on generated data, on the CPU.

Usage: python scripts/train_demo_adapters.py [sql json sentiment style] [--output DIR] [--minutes M]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from demo_data.adapters import SPECS, AdapterSpec
from demo_data.card import environment, write_card
from demo_data.rows import Row
from demo_data.tasks import SEED, training_and_heldout
from demo_model import HUB_NAME, DemoModelError, ensure_demo_model
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader, Sampler
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

ADAPTERS = Path(__file__).resolve().parent / "demo_adapters"
TOKENS_PER_BATCH = 512
WARMUP = 0.05
IGNORED = -100

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TrainingResult:
    """What a training run took and reached."""

    seconds: float
    cpu_seconds: float
    steps: int
    rows: int
    loss: float


def tokenize(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return a dataset of prompt and answer token ids; the answer ends with the turn's end token."""
    records = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row.user}], add_generation_prompt=True, tokenize=False
        )
        records.append(
            {
                "prompt": tokenizer(prompt, add_special_tokens=False)["input_ids"],
                "answer": tokenizer(f"{row.answer}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"],
            }
        )
    dataset = Dataset.from_list(records)
    return dataset.map(lambda record: {"length": len(record["prompt"]) + len(record["answer"])})


class LengthBatches(Sampler[list[int]]):
    """Batches of rows of about one length, each within a token budget, in random order."""

    def __init__(self, lengths: Sequence[int], seed: int) -> None:
        rng = random.Random(seed)
        order = sorted(range(len(lengths)), key=lambda index: (lengths[index], rng.random()))
        self._batches: list[list[int]] = []
        current: list[int] = []
        for index in order:
            # Rows come in rising length, so the newest row sets the padded width.
            if current and lengths[index] * (len(current) + 1) > TOKENS_PER_BATCH:
                self._batches.append(current)
                current = []
            current.append(index)
        if current:
            self._batches.append(current)
        rng.shuffle(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)


def collate(records: Sequence[dict[str, list[int]]], pad: int) -> Batch:
    """Pad a batch on the right: then no position sees padding only, which would turn its attention into NaN."""
    width = max(len(record["prompt"]) + len(record["answer"]) for record in records)
    ids = torch.full((len(records), width), pad)
    labels = torch.full((len(records), width), IGNORED)
    mask = torch.zeros((len(records), width), dtype=torch.long)
    for line, record in enumerate(records):
        tokens = record["prompt"] + record["answer"]
        ids[line, : len(tokens)] = torch.tensor(tokens)
        mask[line, : len(tokens)] = 1
        labels[line, len(record["prompt"]) : len(tokens)] = torch.tensor(record["answer"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def answer_loss(model: PeftModel, batch: Batch) -> torch.Tensor:
    """Return the mean cross entropy over the answer tokens."""
    causal = model.get_base_model()
    hidden = causal.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    targets = batch["labels"][:, 1:]
    answered = targets != IGNORED
    # The vocabulary is large beside the model, so logits of the prompt tokens would cost more than a few layers do.
    logits = causal.lm_head(hidden[:, :-1][answered])
    return torch.nn.functional.cross_entropy(logits.float(), targets[answered])


def learning_rate_factor(progress: float) -> float:
    """Return the share of the peak learning rate at ``progress`` (0 to 1): a short rise, then a straight fall."""
    if progress < WARMUP:
        return max(progress, 0.002) / WARMUP
    return max(0.0, (1.0 - progress) / (1.0 - WARMUP))


def progress_of(step: int, steps: int, minutes: float, limit: float) -> float:
    """Return how far the training is, 0 to 1, by its steps or, on a slow machine, by its time limit."""
    # A machine that keeps up must not notice its clock, or two runs would differ. One that is too slow shows it by the
    # middle of the limit; from then on its learning rate falls so that it also ends small.
    late = minutes / limit if minutes > limit / 2 else 0.0
    return max(step / steps, late)


def fit(
    model: PeftModel,
    loader: DataLoader,
    accelerator: Accelerator,
    peak: float,
    limit: float,
) -> TrainingResult:
    """Train for one pass over ``loader``, or less when ``limit`` minutes run out, and return what came of it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=peak, weight_decay=0.0)
    optimizer, loader = accelerator.prepare(optimizer, loader)
    model.train()
    start, cpu_start = time.perf_counter(), time.process_time()
    losses: list[float] = []
    rows = 0
    for step, batch in enumerate(loader):
        progress = progress_of(step, len(loader), (time.perf_counter() - start) / 60.0, limit)
        if progress >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = peak * learning_rate_factor(progress)
        with accelerator.autocast():
            loss = answer_loss(model, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        rows += len(batch["input_ids"])
        if step % 10 == 0:
            recent = sum(losses[-25:]) / len(losses[-25:])
            print(f"  step {step}/{len(loader)}  loss {recent:.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    if not losses:
        raise ValueError("the time limit left no room for a single step; give more --minutes")
    tail = losses[-25:]
    elapsed, used = time.perf_counter() - start, time.process_time() - cpu_start
    return TrainingResult(elapsed, used, len(losses), rows, sum(tail) / len(tail))


def train_adapter(spec: AdapterSpec, base: Path, output: Path, minutes: float) -> TrainingResult:
    """Train one adapter and save it, with its model card, in ``output``."""
    set_seed(SEED)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    tokenizer = AutoTokenizer.from_pretrained(base)
    # The frozen weights are bfloat16 from the start; autocast would otherwise convert all of them at every step.
    # For sequences this short the CPU's fused attention is the slower one in the backward pass.
    frozen = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation="eager")
    model = get_peft_model(frozen, spec.lora_config())
    train, _ = training_and_heldout(spec.name, spec.rows)
    data = tokenize(train, tokenizer)
    loader = DataLoader(
        data.select_columns(["prompt", "answer"]),
        batch_sampler=LengthBatches(data["length"], SEED),
        collate_fn=lambda records: collate(records, tokenizer.pad_token_id),
    )
    result = fit(model, loader, accelerator, spec.learning_rate, minutes)
    save_adapter(model, output)
    facts = {
        "seconds": round(result.seconds, 1),
        "cpu_seconds": round(result.cpu_seconds, 1),
        "steps": result.steps,
        "rows": result.rows,
        "seed": SEED,
        "final_loss": round(result.loss, 4),
        **environment(),
    }
    (output / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    # Scores of an earlier training say nothing about these weights.
    (output / "scores.json").unlink(missing_ok=True)
    write_card(spec, output)
    return result


def save_adapter(model: PeftModel, output: Path) -> None:
    """Write the adapter as bfloat16 safetensors in PEFT's hub format."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    # PEFT fills in the local folder, which means nothing on another machine.
    model.peft_config["default"].base_model_name_or_path = HUB_NAME
    output.mkdir(parents=True, exist_ok=True)
    # "auto" would ask the hub whether the vocabulary changed; no adapter here touches it.
    model.save_pretrained(output, save_embedding_layers=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the named adapters, all four by default."""
    parser = argparse.ArgumentParser(description="Train the demo LoRA adapters on the CPU.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"adapters to train: {', '.join(SPECS)} (default all)")
    parser.add_argument("--output", type=Path, default=ADAPTERS, help="folder that gets one folder for each adapter")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit for each adapter (default 9)")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(SPECS))
    if unknown:
        parser.error(f"unknown adapter {', '.join(unknown)}; choose from {', '.join(SPECS)}")
    if options.minutes <= 0:
        parser.error("--minutes must be above 0")
    try:
        base = ensure_demo_model()
    except DemoModelError as error:
        print(f"train_demo_adapters: {error}", file=sys.stderr)
        return 1
    for name in options.names or list(SPECS):
        print(f"{name}: training", flush=True)
        result = train_adapter(SPECS[name], base, options.output / name, options.minutes)
        print(f"{name}: {result.steps} steps, {result.rows} rows, {result.seconds:.0f} s, loss {result.loss:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
