"""Milliseconds of the kernels at the sizes of SmolLM2-135M: LoRA, paged attention, packed linears, adapter loads.

    python scripts/bench/bench_kernels.py [--threads 2] [--dtypes float32 bfloat16] [--rounds 15] [--out FOLDER]

One "step" is what one forward pass calls: 210 LoRA layers (8 adapters, rank 8), 30 attention layers, 211 linears.
Every figure is the best of its rounds; with one thread the processor's time is taken, which hardly depends on what
else the machine does. Writes docs/results/kernels.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import write_result
from peft_dist.kernels import attention, backend, lora
from peft_dist.kernels.kv_pool import KVCachePool
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.kernels.types import AttentionMetadata, LoRAPlan
from peft_dist.patches.packed_linear import pack_linear

LAYERS, HIDDEN, KV, MLP, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 30, 576, 192, 1536, 49152, 9, 3, 64
LINEARS = [(HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, HIDDEN), (HIDDEN, MLP), (HIDDEN, MLP), (MLP, HIDDEN)]
NUM_ADAPTERS, RANK = 8, 8

Figures = dict[str, float]


class Stopwatch:
    """Best time of ``rounds`` runs, in milliseconds."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def __call__(self, run: Callable[[], object]) -> float:
        run()
        best = float("inf")
        for _ in range(self.rounds):
            began = self.clock()
            run()
            best = min(best, self.clock() - began)
        return round(best * 1e3, 3)


def random_adapter(seed: int) -> dict[int, tuple[torch.Tensor, torch.Tensor, float]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        index: (torch.randn(RANK, n, generator=generator), torch.randn(m, RANK, generator=generator) / 10, 2.0)
        for index, (n, m) in enumerate(LINEARS * LAYERS)
    }


def bench_lora(stopwatch: Stopwatch, dtype: torch.dtype, pool_dtype: torch.dtype) -> Figures:
    pool = LoRAPool("cpu", pool_dtype)
    for n, m in LINEARS * LAYERS:
        pool.add_layer(n, m)
    for slot in range(NUM_ADAPTERS):
        pool.load(slot, random_adapter(slot))
    adapter = random_adapter(0)
    figures = {"load an adapter over another": stopwatch(lambda: pool.load(0, adapter))}
    shapes = {"decode of 16 rows": 16, "prefill of 600 rows": 600, "one row": 1}
    for name, rows in shapes.items():
        row_slots = np.sort(np.arange(rows) % NUM_ADAPTERS)
        inputs = [torch.randn(rows, n).to(dtype) for n, _ in LINEARS]
        outputs = [torch.zeros(rows, m, dtype=dtype) for _, m in LINEARS]
        for kernels in ("c", "torch"):
            plan = LoRAPlan.from_rows(row_slots)
            assert plan is not None
            plan.backend = kernels

            def step(plan: LoRAPlan = plan, inputs: list = inputs, outputs: list = outputs) -> None:
                for index, weights in enumerate(pool.weights):
                    assert weights is not None
                    lora.add_lora_(outputs[index % 7], inputs[index % 7], weights, plan)

            figures[f"{name}, {kernels}"] = stopwatch(step)
    return figures


def metadata(lengths: list[tuple[int, int]], block_size: int = 16) -> tuple[AttentionMetadata, int]:
    """Sequences of (query tokens, context), blocks in random order."""
    query_lens, contexts = (np.array(column, np.int32) for column in zip(*lengths, strict=True))
    counts = -(-contexts // block_size)
    free = np.random.default_rng(0).permutation(counts.sum()).astype(np.int32).tolist()
    tables = np.zeros((len(lengths), counts.max()), np.int32)
    slots: list[int] = []
    for s, (n, context) in enumerate(lengths):
        tables[s, : counts[s]] = [free.pop() for _ in range(counts[s])]
        slots += [tables[s, p // block_size] * block_size + p % block_size for p in range(context - n, context)]
    starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    arrays = (starts, contexts, tables, np.array(slots, np.int64))
    tensors = (torch.from_numpy(a) for a in arrays)
    return AttentionMetadata(*arrays, *tensors, int(query_lens.max()), int(contexts.max())), int(counts.sum())


def bench_attention(stopwatch: Stopwatch, dtype: torch.dtype) -> Figures:
    figures = {}
    cases = {
        "decode of 16 at context 64": [(1, 64)] * 16,
        "decode of 16 at context 512": [(1, 512)] * 16,
        "prefill of 16 x 37": [(37, 37)] * 16,
        "prefill of 1 x 600": [(600, 600)],
    }
    for name, lengths in cases.items():
        meta, num_blocks = metadata(lengths)
        pool = KVCachePool([(KV_HEADS, HEAD_DIM)] * LAYERS, num_blocks, 16, dtype, "cpu")
        tokens = sum(n for n, _ in lengths)
        query, key, value = (torch.randn(tokens, h, HEAD_DIM).to(dtype) for h in (HEADS, KV_HEADS, KV_HEADS))
        for tensor in (t for cache in pool.caches for t in cache):
            tensor.normal_()
        for kernels in ("c", "torch"):
            meta.backend = kernels

            def step(
                meta: AttentionMetadata = meta, pool: KVCachePool = pool, qkv: tuple = (query, key, value)
            ) -> None:
                for cache in pool.caches:
                    attention.write_kv(qkv[1], qkv[2], cache, meta)
                    attention.paged_attention(qkv[0], cache, meta, scale=HEAD_DIM**-0.5)

            figures[f"{name}, {kernels}"] = stopwatch(step)
    return figures


def bench_linears(stopwatch: Stopwatch, dtype: torch.dtype) -> Figures:
    """All linears of a decoder, and the head alone."""
    figures = {}
    layers = [nn.Linear(n, m, bias=False).to(dtype) for n, m in LINEARS * LAYERS]
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False).to(dtype)
    for kind in ("plain", "packed"):
        if kind == "packed" and not all([pack_linear(layer) for layer in [*layers, head]]):  # noqa: C419
            break
        for rows in (1, 16, 128, 512):
            inputs = {n: torch.randn(rows, n).to(dtype) for n, _ in LINEARS}

            def step(inputs: dict[int, torch.Tensor] = inputs) -> None:
                for layer in layers:
                    layer(inputs[layer.in_features])

            figures[f"210 linears, {rows} rows, {kind}"] = stopwatch(step)
        x = torch.randn(16, HIDDEN).to(dtype)
        figures[f"head, 16 rows, {kind}"] = stopwatch(lambda x=x: head(x))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    stopwatch = Stopwatch(options.rounds)
    results: dict[str, Figures] = {}
    with torch.inference_mode():
        for dtype in (getattr(torch, name) for name in options.dtypes):
            backend.choose("cpu", dtype=dtype)
            for pool_dtype in dict.fromkeys((dtype, torch.float32)):
                results[f"LoRA, {dtype}, adapters {pool_dtype}"] = bench_lora(stopwatch, dtype, pool_dtype)
            results[f"attention, {dtype}"] = bench_attention(stopwatch, dtype)
            results[f"linears, {dtype}"] = bench_linears(stopwatch, dtype)
    for section, figures in results.items():
        print(section)
        for name, milliseconds in figures.items():
            print(f"  {name:<44}{milliseconds:>10.2f} ms")
    unit = "ms, best round" + (", processor time of one thread" if options.threads == 1 else "")
    print("written to", write_result("kernels", {"unit": unit, "rounds": options.rounds, **results}, options.out))


if __name__ == "__main__":
    main()
