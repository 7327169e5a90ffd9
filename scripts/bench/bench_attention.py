"""Microseconds of one layer's paged attention on a GPU, by every back end that is there, inside a CUDA graph.

    python scripts/bench/bench_attention.py [--heads 32 8 128] [--dtype bfloat16] [--block-size 16]
        [--backends NAME ...] [--max-model-len N] [--tune] [--quick] [--out FOLDER]

Each graph holds the calls of several layers, whose caches together are far larger than the L2 cache; a figure is the
median replay, divided by the layers. Decodes are set against the bytes of keys and values they have to read, as a
share of the bandwidth of a large copy (bytes read and written) measured in the same run; prefills against their
products. Back ends that cannot be captured are launched one by one, which their figures say. ``--tune`` tries tiles
and splits of the Triton kernels. Writes docs/results/attention.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from triton.runtime.errors import OutOfResources

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import write_result
from peft_dist.kernels import attention_backends
from peft_dist.kernels.attention_flash import FlashAttention
from peft_dist.kernels.attention_interface import AttentionBackend, AttentionNeeds
from peft_dist.kernels.attention_triton import TritonAttention
from peft_dist.kernels.attention_triton_chunks import ChunkTile
from peft_dist.kernels.attention_triton_decode import DecodeTile
from peft_dist.kernels.capture import CudaCapture
from peft_dist.kernels.kv_pool import KVCachePool
from peft_dist.kernels.types import AttentionMetadata, KVCache

COLD_BYTES = 512 << 20
"""Keys and values that one replay reads at least."""
MOST_LAYERS = 128
ROUNDS, ROUND_SECONDS = 7, 0.02
DEVICE = torch.device("cuda")


class Case(NamedTuple):
    """(query tokens, context) of each sequence."""

    name: str
    lengths: list[tuple[int, int]]


def cases(quick: bool) -> Iterator[Case]:
    batches, contexts = (
        ((1, 32, 256), (257, 2048)) if quick else ((1, 8, 32, 64, 128, 256), (128, 257, 512, 2048, 8192))
    )
    for size in batches:
        for context in contexts:
            yield Case(f"decode of {size} at {context}", [(1, context)] * size)
    rng = np.random.default_rng(0)
    yield Case("decode of 64, lengths log-normal around 1000", [(1, int(n)) for n in rng.lognormal(6.9, 0.8, 64) + 1])
    yield Case("prefill of 128 x 128", [(128, 128)] * 128)
    yield Case("prefill of 4 x 2048", [(2048, 2048)] * 4)
    yield Case("chunk of 512 behind 7680", [(512, 8192)])
    yield Case("chunk of 512 and 64 decodes at 1024", [(512, 512)] + [(1, 1024)] * 64)
    if not quick:
        yield Case("prefill of 8192", [(8192, 8192)])
        yield Case("prefill of 16 x 512", [(512, 512)] * 16)


def metadata(case: Case, block_size: int, max_model_len: int | None) -> tuple[AttentionMetadata, int]:
    """Blocks in random order; ``max_context_len`` is that of a captured step where ``max_model_len`` is given."""
    query_lens, contexts = (np.array(column, np.int32) for column in zip(*case.lengths, strict=True))
    counts = -(-contexts // block_size)
    longest = max(int(contexts.max()), max_model_len or 0)
    order = np.random.default_rng(0).permutation(counts.sum()).astype(np.int32)
    tables = np.zeros((len(contexts), -(-longest // block_size)), np.int32)
    tables[np.arange(tables.shape[1]) < counts[:, None]] = order
    starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    owner = np.repeat(np.arange(len(contexts)), query_lens)
    positions = (contexts - query_lens)[owner] + np.arange(starts[-1]) - starts[owner]
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    arrays = (starts, contexts, tables, slots)
    tensors = (torch.from_numpy(array).to(DEVICE) for array in arrays)
    return AttentionMetadata(*arrays, *tensors, int(query_lens.max()), longest), int(counts.sum())


class Layers:
    """One case's caches and inputs: as many layers as make a replay find nothing in the L2 cache."""

    def __init__(self, case: Case, options: argparse.Namespace) -> None:
        num_heads, num_kv_heads, head_dim = options.heads
        dtype = getattr(torch, options.dtype)
        self.case, self.num_heads, self.num_kv_heads, self.head_dim = case, num_heads, num_kv_heads, head_dim
        self.meta, num_blocks = metadata(case, options.block_size, options.max_model_len)
        each = 2 * num_blocks * options.block_size * num_kv_heads * head_dim * dtype.itemsize
        self.count = max(2, min(MOST_LAYERS, -(-COLD_BYTES // each)))
        self.pool = KVCachePool([(num_kv_heads, head_dim)] * self.count, num_blocks, options.block_size, dtype, DEVICE)
        for cache in self.pool.caches:
            for tensor in cache:
                tensor.normal_()
        tokens = int(self.meta.query_start_loc[-1])
        self.query = torch.randn(tokens, num_heads, head_dim, dtype=dtype, device=DEVICE)
        self.new = torch.randn(2, tokens, num_kv_heads, head_dim, dtype=dtype, device=DEVICE)

    @property
    def needs(self) -> AttentionNeeds:
        cache = self.pool.caches[0]
        dtype, (block_size, heads, dim) = self.query.dtype, cache.key.shape[1:]
        return AttentionNeeds(DEVICE, dtype, dtype, self.num_heads, heads, dim, dim, block_size)

    @property
    def kv_bytes(self) -> int:
        """Keys and values that one layer has to read."""
        per_token = 2 * self.num_kv_heads * self.head_dim * self.query.dtype.itemsize
        return per_token * sum(context for _, context in self.case.lengths)

    @property
    def flops(self) -> int:
        """Of one layer's two products, over what each query sees."""
        pairs = sum(n * context - n * (n - 1) // 2 for n, context in self.case.lengths)
        return 4 * self.num_heads * self.head_dim * pairs

    def run(self, call: Callable[[KVCache], object]) -> None:
        self.meta.scratch.clear()
        for cache in self.pool.caches:
            call(cache)

    def attend(self, backend: AttentionBackend) -> Callable[[KVCache], object]:
        plain: dict[str, Any] = {"sliding_window": None, "softcap": None, "sinks": None}
        scale = self.head_dim**-0.5
        return lambda cache: backend.paged_attention(self.query, cache, self.meta, scale=scale, **plain)

    def microseconds(self, call: Callable[[KVCache], object], captured: bool) -> float:
        """Of one layer."""
        replay = CudaCapture(DEVICE)(lambda: self.run(call)) if captured else lambda: self.run(call)
        return median_seconds(replay) / self.count * 1e6


def median_seconds(run: Callable[[], object]) -> float:
    """Of one call, on the device's clock."""
    run()
    seconds = _seconds(run, 2)
    times = max(2, int(ROUND_SECONDS / max(seconds, 1e-6)))
    return statistics.median(_seconds(run, times) for _ in range(ROUNDS))


def _seconds(run: Callable[[], object], times: int) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began.record()
    for _ in range(times):
        run()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3 / times


def copy_bandwidth() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source))


def candidates(options: argparse.Namespace) -> dict[str, AttentionBackend]:
    found: dict[str, AttentionBackend] = {}
    for name in options.backends or attention_backends.ORDER["cuda"][:3]:
        backend = attention_backends.load(name, torch.device("cuda", 0))
        if isinstance(backend, str):
            print(f"{name}: not here ({backend})")
            continue
        found[name] = backend
        if isinstance(backend, FlashAttention):
            found[f"{name}, decodes too"] = FlashAttention(backend._library)
    if options.tune and "triton" in found:
        for tile in (DecodeTile(k, w, s) for k in (32, 64, 128) for w in (2, 4, 8) for s in (3, 5, 7)):
            found[f"triton, decode {tuple(tile)}"] = TritonAttention(decode_tile=tile)
        for splits in (1, 2, 4, 8, 16, 32):
            found[f"triton, {splits} splits"] = TritonAttention(num_splits=splits)
        for tile in (
            ChunkTile(r, k, w, s) for r in (64, 128) for k in (32, 64, 128) for w in (4, 8) for s in (2, 3, 4)
        ):
            found[f"triton, chunk {tuple(tile)}"] = TritonAttention(chunk_tile=tile)
    return found


def measure(case: Case, backends: dict[str, AttentionBackend], bandwidth: float, options: argparse.Namespace) -> dict:
    layers = Layers(case, options)
    decodes = layers.meta.max_query_len == 1
    figures: dict[str, Any] = {"layers": layers.count, "kv_bytes": layers.kv_bytes, "flops": layers.flops}
    for name, backend in backends.items():
        if ("chunk" in name and decodes) or (("decode" in name or "splits" in name) and not decodes):
            continue
        if backend.supports(layers.needs):
            continue
        try:
            time = layers.microseconds(layers.attend(backend), backend.graph_capturable)
        except OutOfResources as error:
            # A tile that is tried and does not fit.
            figures[name] = {"error": str(error)[:80]}
            continue
        share = {"of_copy_bandwidth": round(layers.kv_bytes / time * 1e6 / bandwidth, 3)} if decodes else {
            "tflops": round(layers.flops / time / 1e6, 1)
        }  # fmt: skip
        figures[name] = {"us": round(time, 2), **share, "graph": backend.graph_capturable}
    writer = next(iter(backends.values()))
    key, value = layers.new
    time = layers.microseconds(lambda cache: writer.write_kv(key, value, cache, layers.meta), True)
    figures["write_kv"] = {"us": round(time, 2)}
    return figures


def show(case: Case, figures: dict[str, Any], tuned: bool) -> None:
    rows = [(name, row) for name, row in figures.items() if isinstance(row, dict) and "us" in row]
    if tuned:
        rows = sorted(rows, key=lambda row: row[1]["us"])[:12]
    print(case.name)
    for name, row in rows:
        told = ", ".join(f"{key} {row[key]}" for key in ("of_copy_bandwidth", "tflops") if key in row)
        print(
            f"  {name:<46}{row['us']:>10.1f} us  {told}{'' if row.get('graph', True) else '  (no graph)'}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], help="of queries, of keys, and their size")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--backends", nargs="+", choices=attention_backends.ORDER["cuda"], default=None)
    parser.add_argument("--max-model-len", type=int, default=None, help="what a captured step is made for")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this measures a GPU")
    results: dict[str, Any] = {}
    with torch.inference_mode():
        bandwidth = copy_bandwidth()
        print(f"copy: {bandwidth / 1e12:.2f} TB/s read and written")
        backends = candidates(options)
        for case in cases(options.quick):
            results[case.name] = measure(case, backends, bandwidth, options)
            show(case, results[case.name], options.tune)
            torch.cuda.empty_cache()
    shape = {"heads": options.heads, "dtype": options.dtype, "block_size": options.block_size}
    shape |= {"max_model_len": options.max_model_len, "copy_bytes_per_second": bandwidth}
    found = {name: backend.description for name, backend in backends.items()}
    print("written to", write_result("attention", {**shape, "back_ends": found, "cases": results}, options.out))


if __name__ == "__main__":
    main()
