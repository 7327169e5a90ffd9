"""What the LoRA kernels alone add to a step of an 8B Llama, in a CUDA graph over all of its layers (one GPU).

    python scripts/bench/bench_lora_kernels.py [--rows 1 8 32 128 256] [--ranks 16] [--popularities same distinct] \\
        [--plans default table default+pdl] [--layers 32] [--out FOLDER]

Nothing else is in the graph, and the adapters of all layers are larger than the caches as soon as several are used. The
floor beside each time is that of the bytes: A and B of every adapter in use once, x read, y read and written, at the
bandwidth with which this card copies. Writes docs/results/lora_kernels.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import write_result
from peft_dist.kernels import reference
from peft_dist.kernels.graph_timing import graph_milliseconds
from peft_dist.kernels.lora_plans import GroupPlan, GroupShape, default_plan, plan_for, tile_count
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.kernels.lora_tiles import LoRATiles, choose_tile_rows, max_tiles, write_tiles
from peft_dist.kernels.lora_triton import lora_expand_group_, lora_shrink_group
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan

GROUPS: dict[str, tuple[int, list[int]]] = {
    "q/k/v": (4096, [4096, 1024, 1024]),
    "o": (4096, [4096]),
    "gate/up": (4096, [14336, 14336]),
    "down": (14336, [4096]),
}
NUM_ADAPTERS = 32
MIXED = (8, 16, 64, 128)

Weights = Sequence[LoRALayerWeights | None]
Group = tuple[str, Weights, torch.Tensor, list[torch.Tensor]]


def slots_of(popularity: str, rows: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    if popularity == "same":
        return np.zeros(rows, np.int32)
    if popularity == "distinct":
        return (np.arange(rows) % NUM_ADAPTERS).astype(np.int32)
    shares = 1.0 / np.arange(1, NUM_ADAPTERS + 1)
    return rng.choice(NUM_ADAPTERS, rows, p=shares / shares.sum()).astype(np.int32)


def ranks_of(rank: str) -> list[int]:
    return [MIXED[slot % len(MIXED)] if rank == "mixed" else int(rank) for slot in range(NUM_ADAPTERS)]


def make_pool(ranks: list[int], layers: int) -> LoRAPool:
    """Every adapter on every layer; slots of one rank hold equal weights, at addresses of their own."""
    pool = LoRAPool("cuda", torch.bfloat16, num_rows=sum(ranks), num_slots=NUM_ADAPTERS)
    sizes = [(n, m) for _ in range(layers) for n, outs in GROUPS.values() for m in outs]
    for size in sizes:
        pool.add_layer(*size)
    sources = {
        size: (torch.randn(128, size[0], device="cuda") / size[0] ** 0.5, torch.randn(size[1], 128, device="cuda"))
        for size in set(sizes)
    }
    for slot, rank in enumerate(ranks):
        cut = ((sources[size][0][:rank], sources[size][1][:, :rank], 0.5) for size in sizes)
        pool.load(slot, dict(enumerate(cut)))
    return pool


def make_groups(pool: LoRAPool, rows: int, layers: int) -> list[Group]:
    """Every group of every layer, on inputs and outputs that layers share."""
    tensors = {}
    for name, (n, outs) in GROUPS.items():
        x, y = (torch.randn(rows, size, device="cuda").bfloat16() for size in (n, sum(outs)))
        tensors[name] = (x, list(y.split(outs, dim=1)))
    groups: list[Group] = []
    first = 0
    for _ in range(layers):
        for name, (_, outs) in GROUPS.items():
            groups.append((name, pool.weights[first : first + len(outs)], *tensors[name]))
            first += len(outs)
    return groups


def make_plan(row_slots: np.ndarray) -> LoRAPlan:
    """As in a captured step: with room for any batch of so many rows."""
    tile_rows = choose_tile_rows(row_slots) if len(row_slots) > 256 else 16
    room = max_tiles(len(row_slots), NUM_ADAPTERS, tile_rows)
    arrays = [np.zeros(size, np.int32) for size in (room * tile_rows, room, room)]
    write_tiles(row_slots, *arrays, tile_rows=tile_rows)
    plan = LoRAPlan.from_rows(row_slots, "triton")
    assert plan is not None
    plan.tiles = LoRATiles(*(torch.from_numpy(array).cuda() for array in arrays), tile_rows=tile_rows)
    return plan


def launches(kind: str, plan: LoRAPlan) -> dict[str, GroupPlan]:
    """By group: ``default`` from the shape alone, ``table`` from what was measured on this card; ``+pdl`` on top."""
    assert plan.tiles is not None
    found = {}
    for name, (n, outs) in GROUPS.items():
        shape = GroupShape(plan.tiles.tile_rows, tile_count(plan.tiles.max_tiles, plan.tiles.tile_rows), n, tuple(outs))
        base = default_plan(shape) if kind.startswith("default") else plan_for(shape, torch.cuda.get_device_name())
        found[name] = replace(base, pdl=True) if kind.endswith("+pdl") else base
    return found


def run(groups: Sequence[Group], plan: LoRAPlan, launch: dict[str, GroupPlan], halves: str = "both") -> None:
    for name, weights, x, ys in groups:
        if halves != "expand":
            lora_shrink_group(x, weights, plan, launch=launch[name])
        if halves != "shrink":
            lora_expand_group_(ys, weights, plan, is_next=halves == "both", launch=launch[name])


def check(groups: Sequence[Group], plan: LoRAPlan, launch: dict[str, GroupPlan]) -> float:
    """Worst error of the added part over the groups of one layer, relative, in the Frobenius norm; y starts at 0."""
    worst = 0.0
    for name, weights, x, ys in groups[: len(GROUPS)]:
        outs = [torch.zeros_like(y, dtype=torch.float32) for y in ys]
        lora_shrink_group(x, weights, plan, launch=launch[name])
        lora_expand_group_(outs, weights, plan, is_next=True, launch=launch[name])
        for out, w in zip(outs, weights, strict=True):
            assert w is not None
            exact = reference.add_lora_(torch.zeros_like(out), x, w, plan)
            worst = max(worst, float((out - exact).norm() / exact.norm()))
    return worst


def floor_bytes(row_slots: np.ndarray, ranks: list[int], layers: int) -> int:
    used = sum(ranks[slot] for slot in np.unique(row_slots))
    weights = sum(used * (len(outs) * n + sum(outs)) for n, outs in GROUPS.values())
    rows = sum(len(row_slots) * (n + 2 * sum(outs)) for n, outs in GROUPS.values())
    return 2 * layers * (weights + rows)


def copy_bandwidth() -> float:
    """Bytes a second, reads and writes together."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = graph_milliseconds(lambda: target.copy_(source))
    return 2 * source.numel() / milliseconds * 1e3


def measure(pool: LoRAPool, ranks: list[int], rows: int, popularity: str, options: Any, bandwidth: float) -> list[Any]:
    row_slots = slots_of(popularity, rows)
    plan = make_plan(row_slots)
    groups = make_groups(pool, rows, options.layers)
    found = []
    for kind in options.plans:
        launch = launches(kind, plan)
        error = check(groups, plan, launch)
        assert error < 2e-3, f"{kind}, {rows} rows, {popularity}: the added parts are off by {error:.1e}"

        def timed(what: str, chosen: Sequence[Group] = groups, launch: dict[str, GroupPlan] = launch) -> float:
            call: Callable[[], None] = lambda: run(chosen, plan, launch, what)  # noqa: E731
            return round(graph_milliseconds(call), 4)

        found.append(
            {
                "plan": kind,
                "ms": timed("both"),
                "shrink_ms": timed("shrink"),
                "expand_ms": timed("expand"),
                "group_ms": {name: timed("both", [g for g in groups if g[0] == name]) for name in GROUPS},
                "floor_ms": round(floor_bytes(row_slots, ranks, options.layers) / bandwidth * 1e3, 4),
                "worst_error": error,
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--ranks", nargs="+", default=["16", "8", "64", "128", "mixed"])
    parser.add_argument("--popularities", nargs="+", default=["same", "distinct", "zipf"])
    parser.add_argument("--plans", nargs="+", default=["default", "default+pdl", "table"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    results = []
    with torch.inference_mode():
        bandwidth = copy_bandwidth()
        print(f"copies at {bandwidth / 1e12:.2f} TB/s")
        for rank in options.ranks:
            ranks = ranks_of(rank)
            pool = make_pool(ranks, options.layers)
            for popularity in options.popularities:
                for rows in options.rows:
                    for figures in measure(pool, ranks, rows, popularity, options, bandwidth):
                        results.append({"rank": rank, "popularity": popularity, "rows": rows, **figures})
                        print(*(f"{key} {value}" for key, value in results[-1].items()), sep=" · ", flush=True)
            del pool
            torch.cuda.empty_cache()
    about = {"layers": options.layers, "adapters": NUM_ADAPTERS, "copy_bytes_per_second": round(bandwidth)}
    print("written to", write_result("lora_kernels", {**about, "results": results}, options.out))


if __name__ == "__main__":
    main()
