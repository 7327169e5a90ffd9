"""PEFT's own mixed batch on the demo's chats."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers.generation.streamers import BaseStreamer


class FirstToken(BaseStreamer):
    """Notes when the first token of the batch came (the prompt itself is put first)."""

    def __init__(self) -> None:
        self.calls = 0
        self.at = 0.0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Nothing is kept open."""


def run_peft(
    model_path: Path, adapters: Mapping[str, Path], chats: list[tuple[str, str]], max_tokens: int
) -> tuple[list[str], dict[str, float]]:
    """Answers and timings of ``generate(adapter_names=...)`` on the left-padded batch; after a short warm-up."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    first, *others = adapters.items()
    model = PeftModel.from_pretrained(base, str(first[1]), adapter_name=first[0])
    for name, path in others:
        model.load_adapter(str(path), name)
    model.eval()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
        )
        for _, message in chats
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
    names = ["__base__" if name == "base" else name for name, _ in chats]
    for count in (4, max_tokens):
        streamer = FirstToken()
        started = time.perf_counter()
        with torch.no_grad():
            output = model.generate(
                **batch, adapter_names=names, max_new_tokens=count, do_sample=False, streamer=streamer,
                pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        seconds = time.perf_counter() - started
    drawn = output[:, batch["input_ids"].shape[1] :]
    ends = (drawn == tokenizer.eos_token_id).int()
    lengths = torch.where(ends.any(1), ends.argmax(1) + 1, drawn.shape[1])
    answers = [tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(drawn, lengths, strict=True)]
    return answers, {"seconds": seconds, "tokens": int(lengths.sum()), "first token": streamer.at - started}
