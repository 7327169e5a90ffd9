"""What every engine is given in the GPU benchmarks, and how it is timed: one definition for ours, vLLM and PEFT.

Random weights in the shape of Llama-3.1-8B (or smaller), random adapters on all seven linears in PEFT's format,
prompts of random ids, greedy, no stop token. Imports nothing but the standard library until adapters are written,
because it also runs in environments that have nothing else of this project.
"""

from __future__ import annotations

import errno
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ADAPTERS, RANK = 32, 16
BATCHES = (1, 8, 32, 64, 128, 256)
KINDS = ("none", "same", "zipf", "distinct", "eight")
PROMPT_TOKENS, NEW_TOKENS = 128, 129
REQUESTS = 512
# Of every engine; and of ours the tokens of a step, as of an LLM.
SEATS, MAX_MODEL_LEN = 256, 4096
STEP_TOKENS = 8192
PREFILL = 32, 512
"""Prompts, and tokens of each, of ``time_prefill``."""
MIXED_RANKS = (8, 16, 64, 128)
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    "70b": {  # Llama-2's
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "mid": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000, "max_position_embeddings": 8192,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048, "max_position_embeddings": 2048,
    },
}  # fmt: skip

Lengths = list[tuple[int, int]]
Run = Callable[[list[list[int]], list[int], "list[int] | None"], float]
"""(prompts, new tokens of each, adapter number of each or None) -> seconds."""


def model_config(shape: str) -> dict[str, Any]:
    """config.json of a Llama of this shape; token ids above 999 are ordinary."""
    sizes = SHAPES[shape]
    special = {"bos_token_id": sizes["vocab_size"] - 256, "eos_token_id": sizes["vocab_size"] - 255}
    return dict(
        sizes, architectures=["LlamaForCausalLM"], model_type="llama", rms_norm_eps=1e-5, rope_theta=500000.0,
        hidden_act="silu", tie_word_embeddings=False, torch_dtype="bfloat16", attention_bias=False, mlp_bias=False,
        **special,
    )  # fmt: skip


def linear_shapes(shape: str) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of the seven linears of a layer, by their path in it."""
    return linears_of(SHAPES[shape])


def linears_of(sizes: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """As ``linear_shapes``, of what a Llama-like config.json says."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    query, kv = (sizes[key] * sizes["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    return {
        "self_attn.q_proj": (hidden, query), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (query, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip


def ranks_of(rank: int | str, count: int) -> list[int]:
    """The rank of each adapter: all alike, or 8, 16, 64, 128 in turn for "mix"."""
    return [MIXED_RANKS[i % len(MIXED_RANKS)] if rank == "mix" else int(rank) for i in range(count)]


def write_base(shape: str, folder: Path) -> Path:
    """``folder``/base-SHAPE with config.json and nothing else."""
    path = folder / f"base-{shape}"
    path.mkdir(parents=True, exist_ok=True)
    # Put in place whole: another run may be reading it.
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{path.name}.") as made:
        config = Path(made, "config.json")
        config.write_text(json.dumps(model_config(shape)))
        config.replace(path / "config.json")
    return path


def write_adapters(
    shape: str, folder: Path, ranks: Sequence[int], device: str = "cpu", label: str = "adapter", std: float = 0.01
) -> dict[str, Path]:
    """Random bf16 adapters (``std`` of A and B, alpha twice the rank) by name; those there already are kept.

    ``device`` "auto" is the GPU where there is one; that is looked up only when something has to be written.
    """
    paths = {}
    for number, rank in enumerate(ranks):
        path = folder / f"{label}-{shape}-r{rank}-std{std}-{number}"
        paths[f"{label}{number}"] = path
        if not (path / "adapter_config.json").exists():
            write_adapter(path, SHAPES[shape], rank, number, device, std)
    return paths


def write_adapter(
    path: Path, sizes: dict[str, Any], rank: int, seed: int, device: str = "cpu", std: float = 0.01
) -> None:
    """A random bf16 adapter in PEFT's format on all linears of a model of these sizes."""
    import torch
    from safetensors.torch import save_file

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(seed)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, generator=generator).mul_(std).to(torch.bfloat16).cpu()

    linears, tensors = linears_of(sizes), {}
    for layer in range(sizes["num_hidden_layers"]):
        for name, (inputs, outputs) in linears.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = draw(rank, inputs)
            tensors[f"{key}.lora_B.weight"] = draw(outputs, rank)
    # Put in place whole: another run may write the same one, or read it.
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f"{path.name}."))
    save_file(tensors, str(made / "adapter_model.safetensors"))
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0,
        "bias": "none", "target_modules": [name.split(".")[1] for name in linears], "inference_mode": True,
        "base_model_name_or_path": "",
    }  # fmt: skip
    (made / "adapter_config.json").write_text(json.dumps(settings))
    try:
        made.rename(path)
    except FileExistsError:
        shutil.rmtree(made)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        shutil.rmtree(made)


def lengths(requests: int = REQUESTS) -> Lengths:
    """(prompt, new) tokens of each request: log-normal, 4 to 1024, from seed 1."""
    chance = random.Random(1)

    def draw(mu: float, sigma: float) -> list[int]:
        return [max(4, min(1024, int(chance.lognormvariate(mu, sigma)))) for _ in range(requests)]

    prompts = draw(4.6, 1.1)
    return list(zip(prompts, draw(4.9, 0.9), strict=True))


class Stream:
    """Random prompts and choices of adapters. One for each measurement, so that a slice of them asks the same."""

    def __init__(self, seed: str, shape: str, adapters: int = ADAPTERS) -> None:
        self._chance = random.Random(seed)
        self._ids = (1000, min(100_000, SHAPES[shape]["vocab_size"] - 256))
        self._adapters = adapters

    def prompt(self, tokens: int) -> list[int]:
        return [self._chance.randrange(*self._ids) for _ in range(tokens)]

    def choose(self, kind: str, count: int) -> list[int] | None:
        """The adapter of each of ``count`` requests; "zipf" is the n-th with a chance of about 1 / n²."""
        if kind == "none":
            return None
        if kind == "zipf":
            return [min(int(self._chance.paretovariate(1.0)) - 1, self._adapters - 1) for _ in range(count)]
        return [
            i % {"same": 1, "distinct": self._adapters, "eight": min(8, self._adapters)}[kind] for i in range(count)
        ]


def choose_for_throughput(kind: str, count: int, adapters: int = ADAPTERS) -> list[int] | None:
    """As ``Stream.choose``, but "zipf" is the n-th with a chance in proportion to 1 / n, from seed 2."""
    if kind == "zipf":
        return random.Random(2).choices(range(adapters), [1 / (i + 1) for i in range(adapters)], k=count)
    return Stream("", "8b", adapters).choose(kind, count)


def time_decode(
    run: Run, shape: str, kind: str, batch: int, adapters: int = ADAPTERS, new_tokens: int = NEW_TOKENS,
    prompt_tokens: int = PROMPT_TOKENS,
) -> dict[str, Any]:  # fmt: skip
    """A step's and a prefill's milliseconds at a fixed batch: (time of 129 tokens - time of 1) / 128, best of two."""
    stream = Stream(f"{kind} {batch}", shape, adapters)
    chosen = stream.choose(kind, batch)

    def seconds(length: int, count: int) -> float:
        prompts = [stream.prompt(length) for _ in range(batch)]
        return run(prompts, [count] * batch, chosen)

    seconds(16, min(8, new_tokens))
    firsts = [seconds(prompt_tokens, 1) for _ in range(2)]
    first = min(firsts)
    whole = min(seconds(prompt_tokens, new_tokens) for _ in range(2))
    steps = new_tokens - 1
    return {
        "adapters": kind, "batch": batch, "distinct": len(set(chosen or ())),
        "prefill_ms": round(first * 1e3, 2), "prefills_ms": [round(each * 1e3, 2) for each in firsts],
        "step_ms": round((whole - first) / steps * 1e3, 3),
        "tokens_per_s": round(batch * steps / (whole - first), 1), "new_tokens": new_tokens,
    }  # fmt: skip


def time_prefill(
    run: Run, shape: str, kind: str, batch: int, prompt_tokens: int, adapters: int = ADAPTERS
) -> dict[str, Any]:
    """Milliseconds until all of ``batch`` prompts have their first token, best of three."""
    stream = Stream(f"prefill {kind} {batch}", shape, adapters)
    chosen = stream.choose(kind, batch)

    def once() -> float:
        return run([stream.prompt(prompt_tokens) for _ in range(batch)], [1] * batch, chosen)

    once()
    times = [once() for _ in range(3)]
    return {
        "adapters": kind, "batch": batch, "each_prompt_tokens": prompt_tokens, "prefill_ms": round(min(times) * 1e3, 2),
        "prefills_ms": [round(each * 1e3, 2) for each in times],
    }  # fmt: skip


def time_throughput(
    run: Run, shape: str, kind: str, sizes: Lengths | None = None, adapters: int = ADAPTERS
) -> dict[str, Any]:
    """All requests at once; the adapters are loaded before, by a short run that uses each."""
    sizes = lengths() if sizes is None else sizes
    stream = Stream(f"throughput {kind}", shape, adapters)
    chosen = choose_for_throughput(kind, len(sizes), adapters)
    used = sorted(set(chosen)) if chosen else None
    short = used or [0] * min(32, len(sizes))
    run([stream.prompt(16) for _ in short], [2] * len(short), used)
    prompts = [stream.prompt(tokens) for tokens, _ in sizes]
    seconds = run(prompts, [tokens for _, tokens in sizes], chosen)
    tokens = sum(count for _, count in sizes)
    return {
        "adapters": kind, "requests": len(sizes), "prompt_tokens": sum(p for p, _ in sizes), "output_tokens": tokens,
        "most_of_one_adapter": max(Counter(chosen).values()) if chosen else 0,
        "seconds": round(seconds, 3), "output_tokens_per_s": round(tokens / seconds, 1),
    }  # fmt: skip


def emit(**figures: Any) -> None:
    """One measurement as a line of JSON, at once: a run that is cut off keeps what it has."""
    print(json.dumps(figures), flush=True)


def clocked(work: Callable[[], Any], synchronize: Callable[[], Any] = lambda: None) -> float:
    """Wall seconds of ``work``, begun when the device is idle."""
    synchronize()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_lines(text: str) -> Iterator[dict[str, Any]]:
    """The measurements among the lines that a program wrote."""
    for line in text.splitlines():
        if line.startswith("{"):
            yield json.loads(line)
