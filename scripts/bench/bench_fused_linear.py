"""Linears of a decode step with their adapters inside of the product, beside cuBLAS and the separate LoRA kernels.

    python scripts/bench/bench_fused_linear.py [--rows 32 128 8 1 64] [--linears gate down qkv o] [--seconds 235]
                                               [--output FOLDER]

In CUDA graphs over enough layers of an 8B Llama that no cache helps; µs of a call: ``cublas``, the product alone (of
gate and up with the activation behind it); ``triton``, the same by our kernel, the best of some plans; ``chain``,
cuBLAS with the shrink beside it and the expand behind it, as a step has them today; ``fused``, one launch (for gate and
up and the activation), the best plan for both batches: all rows of one adapter, and as many adapters as rows, up to 32;
``gated``, one launch with the activation inside.
Each form is compared with the plain twin in float32 before it is timed. One JSON line a case; ``fused_linear.json`` has
all plans. ``--tiny`` tries the script, in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.report import write_result
from peft_dist.kernels import glue, reference
from peft_dist.kernels.graph_timing import graph_milliseconds
from peft_dist.kernels.lora_fused import fused_linear, plain_linear
from peft_dist.kernels.lora_fused_plans import FusedPlan
from peft_dist.kernels.lora_gate_triton import lora_expand_gate
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.kernels.lora_tiles import LoRATiles, max_tiles, write_tiles
from peft_dist.kernels.lora_triton import lora_expand_group_, lora_shrink_group
from peft_dist.kernels.types import LoRAPlan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS, RANK, DTYPE = 32, 16, torch.bfloat16 if DEVICE == "cuda" else torch.float16
SIZES: dict[str, tuple[int, tuple[int, ...], int]] = {
    "qkv": (4096, (4096, 1024, 1024), 16), "o": (4096, (4096,), 16), "gate": (4096, (14336, 14336), 8),
    "down": (14336, (4096,), 12),
}  # fmt: skip
TINY = {
    "qkv": (64, (64, 32, 32), 2), "o": (64, (64,), 2), "gate": (64, (128, 128), 2), "down": (128, (64,), 2),
}  # fmt: skip
# A processor's memory, with room for what a program holds besides, and the programs that registers leave room for.
SHARED, PROGRAMS, PROCESSORS = 220_000, 4, 132


class Linear:
    """Layers of one kind, their adapters, and inputs."""

    def __init__(self, name: str, sizes: tuple[int, tuple[int, ...], int]) -> None:
        self.name = name
        self.inputs, self.outs, self.copies = sizes
        random = torch.Generator(DEVICE).manual_seed(len(name))
        self._random = lambda *size: torch.randn(*size, generator=random, device=DEVICE, dtype=DTYPE)
        self.own = [self._random(sum(self.outs), self.inputs) / self.inputs**0.5 for _ in range(self.copies)]
        self.pool = LoRAPool(DEVICE, DTYPE, num_rows=SLOTS * RANK, num_slots=SLOTS, page_rows=8)
        for out in self.outs * self.copies:
            self.pool.add_layer(self.inputs, out)
        for slot in range(SLOTS):
            self.pool.load(slot, {
                i: (self._random(RANK, self.inputs) / self.inputs**0.5, self._random(out, RANK) / 2, 0.5)
                for i, out in enumerate(self.outs * self.copies)
            })  # fmt: skip
        count = len(self.outs)
        weights = [w for w in self.pool.weights if w is not None]
        self.groups = [weights[first : first + count] for first in range(0, len(weights), count)]

    def take_rows(self, rows: int) -> None:
        """Inputs of so many rows from now on, and what their outputs are for each kind of batch."""
        self.x = self._random(rows, self.inputs)
        self.slots = {"one": np.zeros(rows, np.int32), "distinct": np.arange(rows, dtype=np.int32) % SLOTS}
        self.tiles = {kind: tiles_of(slots) for kind, slots in self.slots.items()}
        self.base = self.x.float() @ self.own[0].float().T
        self.wanted = {kind: self._added(kind) for kind in self.slots}

    def _added(self, kind: str) -> torch.Tensor:
        plan = LoRAPlan.from_rows(self.slots[kind])
        assert plan is not None
        parts = [
            reference.add_lora_(y.clone(), self.x.float(), w, plan)
            for y, w in zip(self.base.split(self.outs, dim=1), self.groups[0], strict=True)
        ]
        return torch.cat(parts, dim=1)

    def plan(self, kind: str) -> LoRAPlan:
        """A pass's."""
        starts = np.array([0, len(self.x)], np.int32)
        layers = self.pool.addressed_weights if DEVICE == "cuda" else self.pool.weights
        return LoRAPlan(np.zeros(1, np.int32), starts, backend="triton", tiles=self.tiles[kind], layers=layers)

    # One call of each form, for layer i

    def cublas(self, i: int) -> torch.Tensor:
        return torch.mm(self.x, self.own[i].T)

    def triton(self, i: int, launch: FusedPlan, activation: str | None = None) -> torch.Tensor:
        return plain_linear(self.x, self.own[i], self.pool.workspace, launch=launch, activation=activation)

    def chain(self, i: int, plan: LoRAPlan, gate: bool = True) -> torch.Tensor:
        """As ``lora_beside`` does it; the activation is in the expand where a step has one."""
        if self.pool.workspace.stream is None:
            lora_shrink_group(self.x, self.groups[i], plan)
            y = self.cublas(i)
        else:
            current, stream = torch.cuda.current_stream(), self.pool.workspace.stream
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                lora_shrink_group(self.x, self.groups[i], plan)
            y = self.cublas(i)
            current.wait_stream(stream)
        ys = y.split(self.outs, dim=1)
        if gate and len(self.outs) == 2:
            return lora_expand_gate(ys[0], ys[1], self.groups[i], plan)
        lora_expand_group_(ys, self.groups[i], plan)
        return y

    def fused(self, i: int, plan: LoRAPlan, launch: FusedPlan, activation: str | None = None) -> torch.Tensor:
        return fused_linear(self.x, self.own[i], self.groups[i], plan, launch=launch, activation=activation)

    def time(self, call: Callable[[int], torch.Tensor], activated: bool = True) -> float:
        """µs of a call with the activation behind it."""
        kernels = glue.implementation("triton")

        def run() -> None:
            for i in range(self.copies):
                y = call(i)
                if activated and len(self.outs) == 2:
                    kernels.gated(*y.split(self.outs, dim=1), "silu")

        if DEVICE == "cpu":
            began = time.perf_counter()
            run()
            return (time.perf_counter() - began) * 1e6 / self.copies
        return graph_milliseconds(run, rounds=15) * 1e3 / self.copies

    def time_planned(self, call: Callable[[int, LoRAPlan], torch.Tensor], kind: str, activated: bool = True) -> float:
        """The same of calls that take a pass's plan: a new one for each time that they are queued."""
        held: list[LoRAPlan] = []

        def with_plan(i: int) -> torch.Tensor:
            if i == 0:
                held[:] = [self.plan(kind)]
            return call(i, held[0])

        return self.time(with_plan, activated)


def tiles_of(slots: np.ndarray) -> LoRATiles:
    """As many as a captured step of so many rows has."""
    room = max_tiles(len(slots), SLOTS, 16, has_base=True)
    arrays = [np.zeros(size, np.int32) for size in (room * 16, room, room)]
    write_tiles(slots, *arrays, tile_rows=16, has_base=True)
    return LoRATiles(*(torch.from_numpy(a).to(DEVICE) for a in arrays), tile_rows=16, has_base=True)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def products(linear: Linear, tiny: bool) -> Iterator[FusedPlan]:
    """Plans of the product: several programs a processor, all of which run at once, or nearly."""
    rows = max(16, 1 << (len(linear.x) - 1).bit_length())
    if tiny:
        yield from (FusedPlan(16, split, 2, block_n=16, shrink_k=16) for split in (1, 2))
        return
    few = [(64, 128, 3, 4, True), (64, 128, 3, 4, False), (64, 64, 4, 4, True),
           (64, 128, 4, 4, True), (128, 64, 4, 4, True)]  # fmt: skip
    many = [(64, 64, 4, 4, True), (128, 64, 3, 8, True), (128, 64, 4, 8, True),
            (128, 64, 3, 4, False), (128, 128, 3, 8, True)]  # fmt: skip
    for block_n, block_k, stages, warps, tma in few if rows < 64 else many:
        at_once = min(SHARED // (stages * (block_n + rows) * block_k * 2), PROGRAMS * 4 // warps) * PROCESSORS
        blocks = sum(linear.outs) // block_n
        splits = [s for s in (1, 2, 4, 8, 16) if linear.inputs % (s * block_k) == 0 and linear.inputs // s >= 512]
        # The most programs that run at once, and where that leaves room, the next finer parts.
        fitting = [s for s in splits if blocks * s <= at_once] or [1]
        wanted = {fitting[-1]} | {s for s in splits if at_once < blocks * s <= 1.6 * at_once}
        yield from (FusedPlan(block_k, s, stages, block_n, warps, tma) for s in sorted(wanted))


def gated_products(linear: Linear, tiny: bool) -> Iterator[FusedPlan]:
    """The same where a program computes a block of both layers, and what becomes of them."""
    if tiny:
        yield FusedPlan(16, 1, 2, block_n=16, shrink_k=16)
        return
    few = [(64, 64, 4, 4, True), (64, 64, 3, 4, True), (64, 64, 4, 4, False),
           (64, 128, 2, 4, True)]  # fmt: skip
    many = [(64, 64, 3, 4, True), (64, 64, 3, 8, True), (64, 64, 4, 8, True)]
    for block_n, block_k, stages, warps, tma in few if len(linear.x) <= 32 else many:
        yield FusedPlan(block_k, 1, stages, block_n, warps, tma)


def with_adapters(best: FusedPlan, tiles: int, rows: int, tiny: bool) -> Iterator[FusedPlan]:
    """What is tried of the adapters' part around a product's plan. Many rows have no registers for many tiles."""
    usual = 1 if tiles >= 16 else 4 if tiles > 1 else 8
    each = (4, 8, 2) if rows <= 32 else (2, 4, 1)
    first = replace(best, each=each[0] if tiles >= each[0] else 1, shrink_split=usual)
    yield first
    if tiny:
        return
    yield replace(first, ahead=True)
    yield replace(first, shrink_split=2 * usual)
    yield replace(first, shrink_split=4 * usual)
    yield replace(first, expand_stages=3)
    if tiles >= max(each):
        yield from (replace(first, each=other) for other in each[1:])


def not_launched() -> tuple[type[Exception], ...]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, CompilationError


class Case:
    """One linear with so many rows."""

    def __init__(self, linear: Linear, rows: int, options: argparse.Namespace) -> None:
        linear.take_rows(rows)
        self.linear, self.options = linear, options
        self.record: dict[str, Any] = {"linear": linear.name, "rows": rows}
        self.tried: list[dict[str, Any]] = []

    def run(self) -> None:
        linear, tiny = self.linear, self.options.tiny
        self.record["cublas"] = linear.time(linear.cublas)
        for kind in linear.slots:
            found = linear.chain(0, linear.plan(kind), gate=False)
            self._check(found, linear.wanted[kind], "chain")
            self.record[f"chain {kind}"] = linear.time_planned(linear.chain, kind, activated=False)
        self._find("fused", products(linear, tiny), None)
        if linear.name == "gate":
            self._find("gated", gated_products(linear, tiny), "silu")

    def _find(self, form: str, plans: Iterable[FusedPlan], activation: str | None) -> None:
        """The best plan of the product alone, then that with adapters around the best three."""
        linear, tiny = self.linear, self.options.tiny
        timed = [(self._try_product(plan, activation), plan) for plan in plans]
        timed = sorted((time for time in timed if time[0] < math.inf), key=lambda item: item[0])
        self.record["triton" if form == "fused" else f"triton {form}"] = timed[0][0]
        self.record[f"{form} product"] = asdict(timed[0][1])
        best: tuple[float, dict[str, float], FusedPlan] = (math.inf, {}, timed[0][1])
        tiles = linear.tiles["one"].max_tiles
        for index, (_, product) in enumerate(timed[:3]):
            for plan in list(with_adapters(product, tiles, len(linear.x), tiny))[: 99 if index == 0 else 2]:
                times = self._try_fused(form, plan, activation)
                total = sum(times.values())
                if times and total < best[0]:
                    best = total, times, plan
        self.record |= {f"{form} {kind}": found for kind, found in best[1].items()}
        self.record[f"{form} plan"] = asdict(best[2])

    def _try_product(self, plan: FusedPlan, activation: str | None) -> float:
        linear = self.linear
        try:
            self._check(linear.triton(0, plan, activation), linear.base, f"product {plan}", activation)
            found = linear.time(lambda i: linear.triton(i, plan, activation), activated=activation is None)
        except not_launched() as problem:
            self.tried.append({"product": asdict(plan), "activation": activation, "failed": str(problem)[:200]})
            return math.inf
        self.tried.append({"product": asdict(plan), "activation": activation, "us": found})
        return found

    def _try_fused(self, form: str, plan: FusedPlan, activation: str | None) -> dict[str, float]:
        linear, times = self.linear, dict[str, float]()
        try:
            for kind in linear.slots:
                found = linear.fused(0, linear.plan(kind), plan, activation)
                self._check(found, linear.wanted[kind], f"{form} {kind} {plan}", activation)
                times[kind] = linear.time_planned(
                    lambda i, pass_: linear.fused(i, pass_, plan, activation), kind, activated=activation is None
                )
        except not_launched() as problem:
            self.tried.append({form: asdict(plan), "failed": str(problem)[:200]})
            return {}
        self.tried.append({form: asdict(plan), "us": times})
        return times

    def _check(self, found: torch.Tensor, wanted: torch.Tensor, what: str, activation: str | None = None) -> None:
        if activation is not None:
            gate, up = wanted.split(self.linear.outs, dim=1)
            wanted = torch.nn.functional.silu(gate) * up
        # The interpreter cuts bfloat16 off; the separate kernels round the product before they add to it.
        limit = 1.6 * error(wanted.to(DTYPE), wanted) + 5e-4
        if (off := error(found, wanted)) > limit or not math.isfinite(off):
            raise SystemExit(f"{self.record}: {what} is off by {off:.2e}, more than {limit:.2e}")


def measure(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    end, longest = time.monotonic() + options.seconds, 0.0
    sizes = TINY if options.tiny else SIZES
    linears = {name: Linear(name, sizes[name]) for name in options.linears}
    for rows in options.rows:
        for name in options.linears:
            began = time.monotonic()
            if began + longest > end:
                yield {"left out": [name, rows]}, []
                continue
            case = Case(linears[name], rows, options)
            case.run()
            longest = max(longest, time.monotonic() - began)
            case.record["seconds"] = time.monotonic() - began
            yield case.record, case.tried


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128, 8, 1, 64])
    parser.add_argument("--linears", nargs="+", choices=list(SIZES), default=["o", "qkv", "down", "gate"])
    parser.add_argument("--seconds", type=float, default=235, help="no case is begun that would end later")
    parser.add_argument("--output", type=Path, help="folder for fused_linear.json (default: docs/results)")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    if DEVICE == "cpu":
        from tests.triton_interpreter import mend

        mend()
    found: list[dict[str, Any]] = []
    try:
        for record, tried in measure(options):
            print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in record.items()}), flush=True)
            found.append(record | {"tried": tried})
    finally:
        print("written to", write_result("fused_linear", found, options.output))


if __name__ == "__main__":
    main()
