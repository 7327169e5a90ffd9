"""Seconds to merge an adapter into SmolLM2 and to unmerge it, both ways, beside the device's copy bandwidth.

    python scripts/bench/bench_merge.py [--device cpu] [--threads 2] [--ranks 8 64] [--rounds 7] [--out FOLDER]

An adapter on all seven linears of each of the 30 layers. "merge" starts from the base, "merge over another" from
another adapter, "unmerge" brings the base back. Every figure is the best of its rounds; with one thread on a CPU the
processor's time is taken, which hardly depends on what else the machine does. "packed" linears are kept in oneDNN's
layout, as the engine does on a CPU. The bytes moved are the least that any way must: each weight read once and
written once, and once more of both where it is packed. Writes docs/results/merge.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import write_result
from peft_dist.kernels.lora_pool import LayerTensors
from peft_dist.patches.host_merger import HostMerger
from peft_dist.patches.lora_layers import SelectiveLinear
from peft_dist.patches.packed_linear import pack_linear, pack_linears, packing_of
from peft_dist.patches.shadow_merger import ShadowMerger

LAYERS, HIDDEN, KV, MLP = 30, 576, 192, 1536
PROJECTIONS = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, KV),
    "v_proj": (HIDDEN, KV),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, MLP),
    "up_proj": (HIDDEN, MLP),
    "down_proj": (MLP, HIDDEN),
}
WAYS = {"shadow": ShadowMerger, "host": HostMerger}
Figures = dict[str, float]


class Stopwatch:
    """Best time of ``rounds`` runs, in seconds, each after an untimed preparation."""

    def __init__(self, rounds: int, device: torch.device) -> None:
        self.rounds = rounds
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        self.clock = time.thread_time if alone else time.perf_counter

    def __call__(self, run: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
        best = float("inf")
        for _ in range(self.rounds + 1):
            prepare()
            self._wait()
            began = self.clock()
            run()
            self._wait()
            best = min(best, self.clock() - began)
        return best

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def make_model(device: torch.device, dtype: torch.dtype, packed: bool) -> nn.Module:
    """SmolLM2's decoder projections, random, with LoRA layers around them."""
    layers = []
    for _ in range(LAYERS):
        linears = {
            name: nn.Linear(*sizes, bias=False, device=device, dtype=dtype) for name, sizes in PROJECTIONS.items()
        }
        if packed:
            for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
                pack_linears([linears[name] for name in group])
            pack_linear(linears["o_proj"])
            pack_linear(linears["down_proj"])
        layers.append(nn.ModuleDict({name: SelectiveLinear.wrap(linear) for name, linear in linears.items()}))
    return nn.ModuleList(layers).requires_grad_(False).eval()


def random_adapter(device: torch.device, rank: int, seed: int) -> dict[str, LayerTensors]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(LAYERS):
        for name, (n, m) in PROJECTIONS.items():
            A, B = torch.randn(rank, n, generator=generator) / n, torch.randn(m, rank, generator=generator)
            parts = [t.pin_memory() if device.type == "cuda" else t for t in (A, B)]
            found[f"{layer}.{name}"] = (parts[0], parts[1], 2.0)
    return found


def copy_bandwidth(stopwatch: Stopwatch, model: nn.Module, to_device: bool) -> float:
    """Bytes a second of copying all weights, read and written bytes counted: within the device, or from the host."""
    weights = [parameter.data for parameter in model.parameters()]
    device = stopwatch.device
    if to_device and device.type == "cuda":
        sources, factor = [torch.empty_like(w, device="cpu", pin_memory=True) for w in weights], 1
    else:
        sources, factor = [torch.zeros_like(w) for w in weights], 2
    targets = [torch.empty_like(w) for w in weights]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)

    return factor * sum(w.nbytes for w in weights) / stopwatch(copy)


def bench(stopwatch: Stopwatch, model: nn.Module, way: str, rank: int, bandwidth: float) -> Figures:
    merger = WAYS[way](model, [f"{layer}.{name}" for layer in range(LAYERS) for name in PROJECTIONS])
    merger.allocate()
    one, other = (random_adapter(stopwatch.device, rank, seed) for seed in range(2))
    weights = sum(parameter.nbytes for parameter in model.parameters())
    passes = 2 if any(packing_of(module) for module in model.modules()) else 1
    moved = 2 * weights * passes
    figures = {
        "merge_s": stopwatch(lambda: merger.merge(one), merger.unmerge),
        "merge_over_another_s": stopwatch(lambda: merger.merge(one), lambda: merger.merge(other)),
        "unmerge_s": stopwatch(merger.unmerge, lambda: merger.merge(one)),
        "second_copies_bytes": float(merger.num_bytes),
        "bytes_moved": float(moved),
        "copying_as_much_s": moved / bandwidth,
    }
    return {name: round(value, 6) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    stopwatch = Stopwatch(options.rounds, device)
    results: dict[str, Figures] = {}
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for packed in (False, True) if device.type == "cpu" else (False,):
            model = make_model(device, dtype, packed)
            bandwidth = copy_bandwidth(stopwatch, model, to_device=False)
            link = copy_bandwidth(stopwatch, model, to_device=True)
            kind = f"{dtype}{', packed' if packed else ''}"
            results[f"copying, {kind}"] = {"bytes_per_s": round(bandwidth), "from_host_bytes_per_s": round(link)}
            for way in WAYS:
                for rank in options.ranks:
                    results[f"{way}, {kind}, rank {rank}"] = bench(stopwatch, model, way, rank, bandwidth)
    for name, figures in results.items():
        print(f"{name:<40}", "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))
    timed = "processor time of one thread" if stopwatch.clock is time.thread_time else "wall time"
    header = {"device": str(device), "unit": f"s, best round, {timed}", "rounds": options.rounds}
    print("written to", write_result("merge", {**header, **results}, options.out))


if __name__ == "__main__":
    main()
