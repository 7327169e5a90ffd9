"""Mixed adapters in one batch with PEFT, as its documentation writes it, plus one line.

    python scripts/examples/peft_dropin.py [--plain] [--model FOLDER] [--adapter NAME=FOLDER ...]

`--plain` leaves the one line out: the answers stay the same, the time does not.
"""

from __future__ import annotations

import argparse
import time

from batch_generate import choose_adapters, default_model
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_dist

QUESTION = "What makes a good cup of tea?"


def main() -> None:
    parser = argparse.ArgumentParser(description="PEFT's adapter_names with and without peft_dist.patch.")
    parser.add_argument("--plain", action="store_true", help="do not patch")
    parser.add_argument("--model", help="folder or hub id of the base model (default: the demo model)")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=PATH", help="repeatable")
    arguments = parser.parse_args()
    folder, adapters = arguments.model or default_model(), choose_adapters(arguments.adapter)

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (first, path), *others = adapters.items()
    peft_model = PeftModel.from_pretrained(model, path, adapter_name=first)
    for name, other in others:
        peft_model.load_adapter(other, adapter_name=name)
    peft_model.eval()

    if not arguments.plain:
        peft_dist.patch(peft_model)  # the one line

    adapter_names = ["__base__", *adapters]
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer([prompt] * len(adapter_names), return_tensors="pt", padding=True)
    begin = time.perf_counter()
    output = peft_model.generate(**inputs, adapter_names=adapter_names, max_new_tokens=40, do_sample=False)
    seconds = time.perf_counter() - begin
    for name, text in zip(
        adapter_names, tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :]), strict=True
    ):
        print(f"{name}: {text.strip()}")
    print(f"{'PEFT' if arguments.plain else 'patched'}: {seconds:.1f} s")


if __name__ == "__main__":
    main()
