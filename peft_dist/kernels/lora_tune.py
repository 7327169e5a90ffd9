"""Measures launch plans of the LoRA kernels on the present GPU: one field after another, from the default plan on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from peft_dist.kernels.lora_gate_triton import lora_expand_gate
from peft_dist.kernels.lora_group import make_tiles
from peft_dist.kernels.lora_plans import GroupPlan, GroupShape, default_plan, fit_plan, tile_count
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.kernels.lora_tiles import LoRATiles, max_tiles
from peft_dist.kernels.lora_triton import lora_expand_group_, lora_shrink_group
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan

Measure = Callable[[GroupPlan], float]
"""Microseconds of a launch with this plan, infinite where the card cannot run it."""

_SLOTS = 32
# More than the card's second-level cache: in a model every layer's adapters come from memory.
_COLD_BYTES = 160 << 20
_MOST_COPIES, _MOST_CALLS = 64, 256


def fields_of(shape: GroupShape, gate: bool) -> dict[str, tuple[Any, ...]]:
    """What is tried of each field of a plan, in this order; ``gate``: of those that only the fused gate has."""
    is_decode = shape.tile_rows == 16
    if gate:
        wide = {"gate_n": (64, 128, 256, 512), "gate_part_n": (32, 64, 128)} if is_decode else {"gate_n": (32, 64, 128)}
        loops = (0, 256, 512, 1024, 2048) if is_decode else (0,)
        return {**wide, "gate_warps": (2, 4, 8) if is_decode else (4, 8), "gate_loop_n": loops}
    return {
        "split": (1, 2, 4, 8, 16, 28) if is_decode else (1, 2, 4),
        "block_k": (128, 256, 512) if is_decode else (64, 128),
        "shrink_warps": (2, 4, 8) if is_decode else (4, 8),
        "shrink_stages": (2, 3, 4),
        "shrink_r": (16, 32) if is_decode else (16, 32, 64),
        "block_n": (64, 128, 256, 512, 1024) if is_decode else (64, 128),
        "part_n": (64, 128, 256) if is_decode else (64, 128),
        "few_rows": (1, 4, 8) if is_decode else (1,),
        "expand_warps": (2, 4, 8) if is_decode else (4, 8),
        "loop_n": (0, 256, 512, 1024, 2048, 4096) if is_decode else (0,),
        "loop_stages": (3, 4, 5),
        "pdl": (False, True),
    }


def descend(shape: GroupShape, start: GroupPlan, fields: dict[str, tuple[Any, ...]], measure: Measure) -> GroupPlan:
    """The best plan that changing one field at a time finds."""
    best, least = start, measure(start)
    known = {start}
    for name, values in fields.items():
        for value in values:
            plan = fit_plan(replace(best, **{name: value}), shape)
            if plan in known:
                continue
            known.add(plan)
            time = measure(plan)
            # A plan that is as good within the noise does not replace a simpler one that was there.
            if time < 0.99 * least:
                best, least = plan, time
    return best


def shapes_of(
    in_features: int, out_features: tuple[int, ...], max_num_seqs: int, max_loras: int, max_tokens: int
) -> Iterator[GroupShape]:
    """Shapes worth measuring for a group of layers: all counts of tiles at decode, and the one of long tiles."""
    counts = sorted({tile_count(tiles, 16) for tiles in range(1, max_tiles(max_num_seqs, max_loras, 16) + 1)})
    yield from (GroupShape(16, count, in_features, out_features) for count in counts)
    for tile_rows in (32, 64, 128):
        if (count := tile_count(1, tile_rows)) * tile_rows <= 2 * max_tokens:
            yield GroupShape(tile_rows, count, in_features, out_features)


def tune_group(bench: GroupBench, shapes: Sequence[GroupShape], done: Callable[[GroupShape, GroupPlan], None]) -> None:
    """Find plans for shapes of one group, each starting from its predecessor's or the default, whichever is better."""
    previous: GroupPlan | None = None
    for shape in shapes:
        measure = partial(bench.measure, shape)
        start = default_plan(shape)
        if previous is not None:
            start = min(start, fit_plan(previous, shape), key=measure)
        plan = descend(shape, start, fields_of(shape, gate=False), measure)
        if bench.has_gate:
            plan = descend(shape, plan, fields_of(shape, gate=True), partial(bench.measure, shape, gate=True))
        done(shape, plan)
        previous = plan if shape.tile_rows == 16 else None


class GroupBench:
    """Random adapters of one group of layers, often enough that no call finds its weights in a cache."""

    def __init__(self, in_features: int, out_features: tuple[int, ...], rank: int, dtype: torch.dtype) -> None:
        self._sizes, self._dtype = (in_features, out_features), dtype
        self.has_gate = len(out_features) == 2 and out_features[0] == out_features[1]
        each = _SLOTS * rank * (len(out_features) * in_features + sum(out_features)) * dtype.itemsize
        copies = min(-(-_COLD_BYTES // each), _MOST_COPIES)
        self._pool = LoRAPool("cuda", dtype, num_rows=_SLOTS * -(-rank // 8) * 8, num_slots=_SLOTS)
        for _ in range(copies):
            for out in out_features:
                self._pool.add_layer(in_features, out)
        A = torch.randn(rank, in_features, device="cuda", dtype=dtype) / in_features**0.5
        Bs = [torch.randn(out, rank, device="cuda", dtype=dtype) for out in out_features] * copies
        for slot in range(_SLOTS):
            self._pool.load(slot, {index: (A, B, 1.0) for index, B in enumerate(Bs)})
        count = len(out_features)
        self._groups = [self._pool.weights[first : first + count] for first in range(0, count * copies, count)]

    def measure(self, shape: GroupShape, plan: GroupPlan, gate: bool = False) -> float:
        """Microseconds of a shrink and an expand, geometric mean over the kinds of batches that have this shape."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        try:
            times = [self._time(batch, plan, gate) for batch in _batches(shape)]
        except (OutOfResources, PTXASError, CompilationError):
            return math.inf
        return math.exp(sum(map(math.log, times)) / len(times))

    def _time(self, batches: Sequence[LoRATiles], launch: GroupPlan, gate: bool) -> float:
        num_rows = int(batches[0].rows.max()) + 1
        in_features, outs = self._sizes
        x = torch.randn(num_rows, in_features, device="cuda", dtype=self._dtype)
        ys = torch.zeros(num_rows, sum(outs), device="cuda", dtype=self._dtype).split(list(outs), dim=1)
        out = torch.empty(num_rows, outs[0], device="cuda", dtype=self._dtype)
        calls = [(weights, _plan_of(tiles, num_rows)) for weights in self._groups for tiles in batches]
        calls = calls[:_MOST_CALLS]

        def run() -> None:
            for weights, plan in calls:
                self._call(x, ys, out, weights, plan, launch, gate)

        return graph_milliseconds(run) * 1e3 / len(calls)

    def _call(
        self,
        x: torch.Tensor,
        ys: Sequence[torch.Tensor],
        out: torch.Tensor,
        weights: Sequence[LoRALayerWeights | None],
        plan: LoRAPlan,
        launch: GroupPlan,
        gate: bool,
    ) -> None:
        lora_shrink_group(x, weights, plan, launch=launch)
        if gate:
            lora_expand_gate(ys[0], ys[1], weights, plan, "silu", out, is_next=True, launch=launch)
        else:
            lora_expand_group_(ys, weights, plan, is_next=True, launch=launch)


def _batches(shape: GroupShape) -> list[list[LoRATiles]]:
    """Kinds of batches of a shape; of each some with other slots, which are called in turn."""
    count, tile_rows = shape.max_tiles, shape.tile_rows
    live = min(count, _SLOTS)
    if tile_rows > 16:
        # Two full tiles an adapter.
        return [[_tiles(np.repeat(np.arange(count) // 2 % _SLOTS, tile_rows), shape)]]
    rows_each = 1 if count <= _SLOTS else 4 if count <= 2 * _SLOTS else 8
    turns = max(1, _SLOTS // live)
    distinct = [_tiles(np.repeat(turn * live + np.arange(live), rows_each), shape) for turn in range(turns)]
    same = max(1, count // 2 * rows_each)
    return [distinct, [_tiles(np.full(same, slot, np.int64), shape) for slot in range(0, _SLOTS, 4)]]


def _tiles(row_slots: np.ndarray, shape: GroupShape) -> LoRATiles:
    """As many tiles as the shape has; those behind the used ones are empty."""
    made = make_tiles(row_slots, torch.device("cuda"), shape.tile_rows)
    lens, slots = (torch.zeros(shape.max_tiles, dtype=torch.int32, device="cuda") for _ in range(2))
    rows = torch.zeros(shape.max_tiles * shape.tile_rows, dtype=torch.int32, device="cuda")
    for target, source in ((rows, made.rows), (slots, made.slots), (lens, made.lens)):
        target[: len(source)] = source
    # Every row is in a tile, so there are no rows of the base that a fused gate would miss.
    return LoRATiles(rows, slots, lens, shape.tile_rows, has_base=True)


def _plan_of(tiles: LoRATiles, num_rows: int) -> LoRAPlan:
    return LoRAPlan(np.zeros(1, np.int32), np.array([0, num_rows], np.int32), backend="triton", tiles=tiles)


def graph_milliseconds(run: Callable[[], None], rounds: int = 10) -> float:
    """Median time of replaying what ``run`` queues, in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    for mark in marks:
        mark.record()
        if mark is not marks[-1]:
            graph.replay()
    torch.cuda.synchronize()
    return float(np.median([a.elapsed_time(b) for a, b in pairwise(marks)]))
