"""Hugging Face's and PEFT's generate on one GPU, and the drop-in on the very same call.

    python scripts/bench/peer_peft.py [--part base one mixed dropin] [--batches 8 32 128] [--new-tokens 33]

base: transformers alone. one: one PEFT adapter for all rows. mixed: `generate(adapter_names=...)` over eight adapters.
dropin: the same call after `peft_dist.patch(model)`. All in bf16, with random weights; the prompts and the clock are
gpu_workload.py's, but with 33 new tokens in place of 129 for the slow ones. One JSON line a measurement.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.gpu_options import make_parser, parse
from bench.gpu_workload import NEW_TOKENS, Run, clocked, emit, ranks_of, time_decode, write_adapters, write_base

PARTS = ("base", "one", "mixed", "dropin")
KIND_OF = {"base": "none", "one": "same", "mixed": "eight", "dropin": "eight"}
NUM_ADAPTERS = 8
FEW_TOKENS = 33


def random_model(shape: str, folder: Path, device: str) -> Any:
    """The base as transformers initialises it, on its device in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(write_base(shape, folder)), dtype=torch.bfloat16
        )
    return model.requires_grad_(False).eval()


def with_adapters(model: Any, paths: dict[str, Path], autocast: bool = False) -> Any:
    """A PeftModel; its adapters in the files' dtype, or in float32 with ``autocast`` (PEFT's own default)."""
    from peft import PeftModel

    (first, path), *others = paths.items()
    peft = PeftModel.from_pretrained(model, str(path), adapter_name=first, autocast_adapter_dtype=autocast)
    for name, other in others:
        peft.load_adapter(str(other), name, autocast_adapter_dtype=autocast)
    return peft.eval()


def runner(model: Any, device: str, names: list[str], part: str) -> Run:
    def run(prompts: list[list[int]], counts: list[int], adapters: list[int] | None) -> float:
        ids = torch.tensor(prompts, device=device)
        extra = {"adapter_names": [names[i] for i in adapters or ()]} if part in ("mixed", "dropin") else {}

        def generate() -> None:
            drawn = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=counts[0],
                min_new_tokens=counts[0], do_sample=False, pad_token_id=0, **extra,
            ).cpu()  # fmt: skip
            assert drawn.shape[1] == ids.shape[1] + counts[0]

        synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        with torch.no_grad():
            return clocked(generate, synchronize)

    return run


def measure(model: Any, part: str, options: Namespace, names: list[str]) -> None:
    import peft_dist

    if part == "one":
        model.set_adapter(names[0])
    if part == "dropin":
        peft_dist.patch(model)
    run = runner(model, options.device, names, part)
    new_tokens = options.new_tokens or (NEW_TOKENS if part == "dropin" else FEW_TOKENS)
    for batch in options.batches:
        emit(engine="peft", part=part, rank=options.rank, autocast=options.autocast,
             **time_decode(run, options.shape, KIND_OF[part], batch, NUM_ADAPTERS, new_tokens))  # fmt: skip
    if part == "dropin":
        peft_dist.unpatch(model)


def main() -> None:
    parser = make_parser(__doc__, PARTS)
    parser.set_defaults(part=list(PARTS), batches=[8, 32, 128], adapters=NUM_ADAPTERS)
    parser.add_argument("--autocast", action="store_true", help="adapters in float32, PEFT's default")
    options = parse(parser)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(options.shape, options.folder, options.device)
    if "base" in options.part:
        measure(model, "base", options, [])
    if others := [part for part in options.part if part != "base"]:
        ranks = ranks_of(options.rank, NUM_ADAPTERS)
        paths = write_adapters(options.shape, options.folder, ranks, options.device)
        model = with_adapters(model, paths, options.autocast)
        for part in others:
            measure(model, part, options, list(paths))


if __name__ == "__main__":
    main()
