"""Times launches of the LoRA kernels on the present GPU as a step has them: between products that fill every cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from peft_dist.kernels.graph_timing import graph_milliseconds
from peft_dist.kernels.lora_gate_triton import lora_expand_gate
from peft_dist.kernels.lora_group import make_tiles
from peft_dist.kernels.lora_plans import GroupPlan, GroupShape
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.kernels.lora_tiles import LoRATiles
from peft_dist.kernels.lora_triton import lora_expand_group_, lora_shrink_group
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan

SLOTS = 32
# More than the card's second-level cache: in a model every layer's weights and adapters come from memory.
_COLD_BYTES = 160 << 20
_MOST_COPIES, _MOST_CALLS = 64, 48


class GroupBench:
    """Random layers of one group, and of their adapters, often enough that no call finds its own in a cache.

    Attributes:
        has_gate: The group is a gated MLP's two layers: their expand is measured with the activation.
    """

    def __init__(self, in_features: int, out_features: tuple[int, ...], rank: int, dtype: torch.dtype) -> None:
        self._sizes, self._dtype = (in_features, out_features), dtype
        self.has_gate = len(out_features) == 2 and out_features[0] == out_features[1]
        layers = [(in_features, out) for out in out_features]
        copies = _copies(SLOTS * rank * sum(map(sum, layers)) * dtype.itemsize)
        self._pool = LoRAPool("cuda", dtype, num_rows=SLOTS * -(-rank // 8) * 8, num_slots=SLOTS)
        for layer in layers * copies:
            self._pool.add_layer(*layer)
        random = partial(torch.randn, device="cuda", dtype=dtype)
        adapters = [(random(rank, k) / k**0.5, random(n, rank)) for k, n in layers]
        for slot in range(SLOTS):
            self._pool.load(slot, {i: (*adapters[i % len(layers)], 1.0) for i in range(len(layers) * copies)})
        weights = self._pool.weights
        self._groups = [weights[first : first + len(layers)] for first in range(0, len(weights), len(layers))]
        shape = sum(out_features), in_features
        own = _copies(math.prod(shape) * dtype.itemsize)
        self._own = [random(*shape) / in_features**0.5 for _ in range(max(own, 2))]
        self._beside = self._pool.workspace.stream
        self._product_times: dict[int, float] = {}

    def measure(self, shape: GroupShape, plan: GroupPlan) -> float:
        """Microseconds that a shrink and an expand take beside a layer's own product, mean over the kinds of batches
        that have this shape; infinite where the card cannot run the plan."""
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        try:
            return float(np.mean([self._time(batches, plan) for batches in _batches(shape)]))
        except (OutOfResources, PTXASError, CompilationError):
            return math.inf

    def _time(self, batches: Sequence[LoRATiles], launch: GroupPlan) -> float:
        num_rows = int(batches[0].rows.max()) + 1
        in_features, outs = self._sizes
        x = torch.randn(num_rows, in_features, device="cuda", dtype=self._dtype)
        joint = torch.zeros(num_rows, sum(outs), device="cuda", dtype=self._dtype)
        plans = [_plan_of(tiles, num_rows, self._pool) for tiles in batches]
        count = min(max(len(self._groups) * len(plans), 16), _MOST_CALLS)

        def products() -> None:
            for i in range(count):
                torch.mm(x, self._own[i % len(self._own)].T, out=joint)

        def adapted() -> None:
            for i in range(count):
                weights, plan = self._groups[i % len(self._groups)], plans[i // len(self._groups) % len(plans)]
                self._call(x, joint, self._own[i % len(self._own)], weights, plan, launch)

        if num_rows not in self._product_times:
            self._product_times[num_rows] = graph_milliseconds(products) * 1e3 / count
        return graph_milliseconds(adapted) * 1e3 / count - self._product_times[num_rows]

    def _call(
        self,
        x: torch.Tensor,
        joint: torch.Tensor,
        own: torch.Tensor,
        weights: Sequence[LoRALayerWeights],
        plan: LoRAPlan,
        launch: GroupPlan,
    ) -> None:
        """As a step does it: where it is captured, the shrink is on a stream of its own (``lora_beside``)."""
        current = torch.cuda.current_stream()
        stream = self._beside if plan.layers and self._beside is not None else current
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            lora_shrink_group(x, weights, plan, launch=launch)
        torch.mm(x, own.T, out=joint)
        current.wait_stream(stream)
        ys = joint.split(list(self._sizes[1]), dim=1)
        if self.has_gate:
            lora_expand_gate(ys[0], ys[1], weights, plan, launch=launch)
        else:
            lora_expand_group_(ys, weights, plan, launch=launch)


def _copies(num_bytes: int) -> int:
    """How many of something make it cold."""
    return min(-(-_COLD_BYTES // num_bytes), _MOST_COPIES)


def _batches(shape: GroupShape) -> list[list[LoRATiles]]:
    """Kinds of batches of a shape; of each some with other slots, which are called in turn."""
    tile_rows = shape.tile_rows
    # A shape counts up to four times the tiles that are there.
    room = max(1, shape.max_tiles // 2)
    if tile_rows > 16:
        # Two full tiles an adapter.
        return [[_tiles(np.repeat(np.arange(room) // 2 % SLOTS, tile_rows), room, tile_rows)]]
    live = min(room, SLOTS)
    rows_each = 1 if room <= SLOTS else 8
    distinct = [
        _tiles(np.repeat(first + np.arange(live), rows_each), room, tile_rows) for first in range(0, SLOTS, live)
    ]
    same = [_tiles(np.full(live * rows_each, slot, np.int64), room, tile_rows) for slot in range(0, SLOTS, 4)]
    return [distinct, same]


def _tiles(row_slots: np.ndarray, room: int, tile_rows: int) -> LoRATiles:
    """As many tiles as there is room for; those behind the used ones are empty."""
    made = make_tiles(row_slots, torch.device("cuda"), tile_rows)
    lens, slots = (torch.zeros(room, dtype=torch.int32, device="cuda") for _ in range(2))
    rows = torch.zeros(room * tile_rows, dtype=torch.int32, device="cuda")
    for target, source in ((rows, made.rows), (slots, made.slots), (lens, made.lens)):
        target[: len(source)] = source
    # Every row is in a tile, so there are no rows of the base that a fused gate would miss.
    return LoRATiles(rows, slots, lens, tile_rows, has_base=True)


def _plan_of(tiles: LoRATiles, num_rows: int, pool: LoRAPool) -> LoRAPlan:
    """Longer tiles are those of steps that are not captured: their launches look tables up themselves."""
    starts = np.array([0, num_rows], np.int32)
    layers = pool.addressed_weights if tiles.tile_rows == 16 else ()
    return LoRAPlan(np.zeros(1, np.int32), starts, backend="triton", tiles=tiles, layers=layers)
