"""How far bf16 logits are from a float32 reference: our mixed LoRA batch beside PEFT's.

    python scripts/bench/accuracy_gpu.py [--part prefill decode] [--shape mid] [--rows 10240] [--rank mix]

A random Llama (hidden 2048, 8 layers) with eight adapters whose updates are about as large as the base's own output,
requests of all adapters and of the base in one batch. The reference is PEFT in float32 (no TF32) on the same bf16
weights, one adapter at a time. "prefill" compares whole rows of logits. "decode" compares the log-probabilities of the
twenty most likely tokens of each drawn token, as the engine reports them, so that captured decode steps are in it.
PEFT runs the same sequences in bf16 with ``adapter_names``, its adapters kept in bf16 and cast to float32
(``autocast_adapter_dtype``). Root mean square errors over all rows, and ours over PEFT's (target: at most 1.05).
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.gpu_engine import DEVICE, add_engine_options, start
from bench.gpu_options import make_parser, parse
from bench.gpu_workload import Stream, emit, ranks_of, write_adapters
from bench.peer_peft import random_model, with_adapters

NUM_ADAPTERS = 8
STD = 0.04
PREFILL_TOKENS, DECODE_PROMPT = 257, 16
TOP = 20


@dataclass
class Observed:
    """Sequences of one length, the adapter of each (None: the base), and what was seen at positions from ``first``.

    Attributes:
        tokens: int64 ``[n, length]``.
        values: ``[n, rows, k]``: logits, or log-probabilities of ``ids``.
        ids: int64 ``[n, rows, k]``; None: all, and ``values`` are logits.
    """

    tokens: Tensor
    names: list[str | None]
    first: int
    values: Tensor
    ids: Tensor | None = None

    def pick(self, logits: Tensor, part: slice) -> Tensor:
        """Of ``[b, length, vocab]`` logits, what ``values`` has, in float32."""
        rows = logits[:, self.first : self.first + self.values.shape[1]].float()
        return rows if self.ids is None else rows.log_softmax(-1).gather(-1, self.ids[part])


def observe_prefill(llm: Any, stream: Stream, rows: int) -> Observed:
    """Our logits of every prompt position that has a successor."""
    from peft_dist import SamplingParams

    count = -(-rows // (PREFILL_TOKENS - 1))
    prompts, names = [stream.prompt(PREFILL_TOKENS) for _ in range(count)], names_for(llm, count)
    seen: dict[str, list[Tensor]] = {}
    runner = llm._open.runner
    score = runner._score_prompt

    def record(step: Any, request_id: str, logits: Tensor, following: list[int]) -> None:
        seen.setdefault(request_id.rsplit("-", 1)[0], []).append(logits.clone())
        score(step, request_id, logits, following)

    runner._score_prompt = record
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate(prompts, params, names, use_tqdm=False)
    del runner._score_prompt
    logits = torch.stack([torch.cat(seen[output.request_id]) for output in outputs])
    return Observed(torch.tensor(prompts, device=DEVICE), names, 0, logits)


def observe_decode(llm: Any, stream: Stream, rows: int, batch: int) -> Observed:
    """Our log-probabilities of the most likely tokens wherever one was drawn."""
    from peft_dist import SamplingParams

    count = -(-rows // batch)
    prompts, names = [stream.prompt(DECODE_PROMPT) for _ in range(batch)], names_for(llm, batch)
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=count, ignore_eos=True, logprobs=TOP) for i in range(batch)
    ]
    outputs = [output.outputs[0] for output in llm.generate(prompts, params, names, use_tqdm=False)]
    tokens = [[*prompt, *output.token_ids] for prompt, output in zip(prompts, outputs, strict=True)]
    likely = [[most_likely(position) for position in output.logprobs] for output in outputs]
    ids = torch.tensor([[[token for token, _ in top] for top in drawn] for drawn in likely], device=DEVICE)
    values = torch.tensor([[[value for _, value in top] for top in drawn] for drawn in likely], device=DEVICE)
    return Observed(torch.tensor(tokens, device=DEVICE), names, DECODE_PROMPT - 1, values, ids)


def most_likely(position: Any) -> list[tuple[int, float]]:
    """(token, log-probability) of the ``TOP`` best; the drawn token, which may be another, is left out."""
    return [(token, entry.logprob) for token, entry in position.items() if entry.rank <= TOP][:TOP]


def names_for(llm: Any, count: int) -> list[str | None]:
    """Every adapter and the base in turn."""
    every = [*(spec.name for spec in llm.adapters), None]
    return [every[i % len(every)] for i in range(count)]


def parts_of(count: int, size: int = 8) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


@torch.no_grad()
def reference(model: Any, observed: Observed) -> Tensor:
    """What float32 gives for ``observed.values``, each adapter set alone."""
    found: Tensor = torch.empty(observed.values.shape, dtype=torch.float32, device=DEVICE)
    for name in dict.fromkeys(observed.names):
        for row in (i for i, own in enumerate(observed.names) if own == name):
            part = slice(row, row + 1)
            if name is None:
                with model.disable_adapter():
                    logits = model(input_ids=observed.tokens[part], use_cache=False).logits
            else:
                model.set_adapter(name)
                logits = model(input_ids=observed.tokens[part], use_cache=False).logits
            found[part] = observed.pick(logits, part)
    return found


@torch.no_grad()
def peft_values(model: Any, observed: Observed) -> Iterator[tuple[slice, Tensor]]:
    """What PEFT's mixed batch gives."""
    for part in parts_of(len(observed.names)):
        names = [name or "__base__" for name in observed.names[part]]
        logits = model(input_ids=observed.tokens[part], adapter_names=names, use_cache=False).logits
        yield part, observed.pick(logits, part)


def rms(pairs: Iterator[tuple[slice, Tensor]], expected: Tensor) -> float:
    """Root mean square error of parts of ``expected``."""
    total = sum(float((values.float() - expected[part]).double().square().sum()) for part, values in pairs)
    return float((total / expected.numel()) ** 0.5)


def compare(observed: dict[str, Observed], load: Callable[[torch.dtype, bool], Any]) -> Iterator[dict[str, Any]]:
    """One line a path; ``load`` gives PEFT's model in a dtype, with or without autocast."""
    exact = load(torch.float32, False)
    expected = {path: reference(exact, own) for path, own in observed.items()}
    del exact
    errors: dict[str, dict[str, float]] = {path: {} for path in observed}
    for label, autocast in (("peft_bf16", False), ("peft_autocast", True)):
        model = load(torch.bfloat16, autocast)
        for path, own in observed.items():
            errors[path][label] = rms(peft_values(model, own), expected[path])
        del model
    for path, own in observed.items():
        ours = rms(((part, own.values[part]) for part in parts_of(len(own.names))), expected[path])
        yield {
            "path": path,
            "rows": own.values.shape[0] * own.values.shape[1],
            "reference_rms": round(float(expected[path].square().mean().sqrt()), 6),
            **{f"rms_{label}": round(value, 8) for label, value in {"ours": ours, **errors[path]}.items()},
            **{f"ours_over_{label}": round(ours / value, 4) for label, value in errors[path].items()},
        }


def main() -> None:
    parser = make_parser(__doc__, ("prefill", "decode"))
    add_engine_options(parser)
    parser.add_argument("--rows", type=int, default=10_240)
    parser.set_defaults(shape="mid", rank="mix", batches=[128], adapters=NUM_ADAPTERS)
    options = parse(parser)
    if options.tiny:
        options.rows, options.batches = 512, [16]
    observed, folder = observe(options)
    paths = write_adapters(options.shape, options.folder, ranks_of(options.rank, NUM_ADAPTERS), DEVICE, std=STD)

    def load(dtype: torch.dtype, autocast: bool) -> Any:
        from transformers import AutoModelForCausalLM

        # Fused attention may round float32 to TF32, which a reference must not.
        attention = "eager" if dtype is torch.float32 else "sdpa"
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).to(DEVICE)
        model = with_adapters(base, paths, autocast)
        return model.float() if dtype is torch.float32 else model

    for figures in compare(observed, load):
        emit(engine="ours", part="accuracy", rank=options.rank, shape=options.shape, **figures)


def observe(options: Namespace) -> tuple[dict[str, Observed], Path]:
    """What our engine gives, and the folder of the checkpoint that it read."""
    folder = options.folder / f"checkpoint-{options.shape}"
    random_model(options.shape, options.folder, DEVICE).save_pretrained(folder)
    ranks = ranks_of(options.rank, NUM_ADAPTERS)
    paths = write_adapters(options.shape, options.folder, ranks, DEVICE, std=STD)
    llm = start(options, paths, ranks, load_format="auto", model=folder)
    stream, observed = Stream("accuracy", options.shape), {}
    if "prefill" in options.part:
        observed["prefill"] = observe_prefill(llm, stream, options.rows)
    if "decode" in options.part:
        observed["decode"] = observe_decode(llm, stream, options.rows, options.batches[0])
    llm.close()
    return observed, folder


if __name__ == "__main__":
    main()
