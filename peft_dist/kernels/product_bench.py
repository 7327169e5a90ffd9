"""Times the ways of a product, alone and with adapters, for layers whose weights come from memory as in a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch.nn import functional

from peft_dist.kernels import glue, lora
from peft_dist.kernels.few_rows import FewRows
from peft_dist.kernels.glue import Activation
from peft_dist.kernels.graph_timing import Timer
from peft_dist.kernels.lora_parts_beside import PartsBeside
from peft_dist.kernels.lora_tiles import LoRATiles, write_tiles
from peft_dist.kernels.product_plans import TIMED_ADAPTERS, ProductPlan
from peft_dist.kernels.spared import spare_multiprocessors
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan

logger = logging.getLogger(__name__)

# As one plan for all, and as what changes the choice of a kernel, to more than half of an H100's 132.
SPARED = (0, 8, 16, 24, 32, 40, 52, 64, 76)
# Layers in a row, whose weights together are more than a second-level cache holds.
LAYERS, _COLD_BYTES = 4, 130 << 20
# Of adapters.
_RANK = 16
# What is as good within the noise is planned as ever.
_BETTER, _CLOSE = 0.98, 1.1
_MANY_ROWS, _FEW_SPARED = 512, 24
# Bytes a millisecond at which who adds a part reads it.
_READ = 2 << 30

Layer = tuple[torch.Tensor, list[LoRALayerWeights]]


class ProductBench:
    """Args:
    few_rows: Our kernel for few rows; None: there is none.
    beside: Computes parts beside products; None: they are added behind.
    time: ``graph_milliseconds``, or a stand-in for tests.
    spared: Numbers of multiprocessors to try; the first is 0.
    """

    def __init__(
        self, few_rows: FewRows | None, beside: PartsBeside | None, time: Timer, spared: Sequence[int] = SPARED
    ) -> None:
        self._few_rows, self._beside, self._time, self._spared = few_rows, beside, time, spared
        self._memory = torch.empty(0)

    def clear(self) -> None:
        """Give the memory for weights back."""
        self._memory = torch.empty(0)

    def alone(self, x: torch.Tensor, out_features: Sequence[int]) -> ProductPlan:
        """The fastest way of a library's ``x @ weight.T`` for x ``[rows, in_features]``."""
        weights = self._weights(x, sum(out_features))

        def multiply(spared: int) -> None:
            for weight in weights:
                with spare_multiprocessors(spared):
                    functional.linear(x, weight)

        times = {ProductPlan("library", c): self._time(partial(multiply, c)) for c in self._counts(x)}
        return _best(times, ProductPlan("library"))

    def alone_or_kernel(
        self, x: torch.Tensor, out_features: Sequence[int], activation: Activation | None, library: ProductPlan
    ) -> ProductPlan:
        """The faster of that and our kernel for few rows, the activation of the outputs' halves included."""
        weights, few_rows = self._weights(x, sum(out_features)), self._few_rows
        assert few_rows is not None

        def by_library() -> None:
            for weight in weights:
                with spare_multiprocessors(library.spared):
                    wide = functional.linear(x, weight)
                if activation is not None:
                    gate, up = wide.split(list(out_features), dim=1)
                    glue.implementation("triton").gated(gate, up, activation)

        def by_kernel() -> None:
            for weight in weights:
                few_rows.multiply(x, weight, activation)

        return _best({library: self._time(by_library), ProductPlan("kernel"): self._time(by_kernel)}, library)

    def adapted(
        self,
        x: torch.Tensor,
        weights: Sequence[LoRALayerWeights],
        plan: LoRAPlan,
        spared: int,
        activation: Activation | None,
        few: bool,
    ) -> ProductPlan | None:
        """The fastest way with adapters, as the sum of a batch where they are all others' and one where all are one's.

        Args:
            x: ``[rows, in_features]``.
            weights: Of the layers, none of them None; the plan's layers have others of the same sizes.
            plan: Of a captured step.
            spared: As is best for the product without adapters.

        Returns:
            None: there is no room for adapters.
        """
        layers = list(self._layers(x, weights, plan))
        if not layers:
            return None
        ways: dict[ProductPlan, Callable[[Layer, LoRAPlan], object]] = {
            ProductPlan("behind"): lambda layer, plan: _add_behind(x, layer, plan, spared, activation)
        }
        beside, few_rows = self._beside, self._few_rows
        if beside is not None and beside.fits(x, weights, plan):
            for c in self._counts(x):
                ways[ProductPlan("beside", c)] = partial(_add_beside, beside, x, c, activation)
        if few and few_rows is not None:

            def inside(layer: Layer, plan: LoRAPlan) -> torch.Tensor | None:
                return few_rows.add_lora(x, layer[0], layer[1], plan, activation)

            if _is_computed(inside, layers, plan):
                ways[ProductPlan("inside")] = inside
        rows, behind = np.arange(len(x)), ProductPlan("behind")
        read = 0.0
        if activation is None:
            read = LAYERS * x.element_size() * len(x) * sum(w.B.shape[1] for w in weights) / _READ
        times = dict.fromkeys(ways, 0.0)
        for slots in (rows % _adapters(weights), rows * 0):
            tiles = _tiles(slots.astype(np.int32), plan)
            for name in times:
                times[name] += self._time(partial(_run, ways[name], layers, plan, tiles)) + read * (
                    name.way == "beside"
                )
            # What is far behind with one batch is not worth a second one.
            least = min(times.values())
            times = {name: ms for name, ms in times.items() if ms < _CLOSE * least or name == behind}
        return _best(times, behind)

    def _counts(self, x: torch.Tensor) -> Sequence[int]:
        """Multiprocessors to try: the more rows, the more of them a product is short of."""
        return [c for c in self._spared if len(x) < _MANY_ROWS or c <= _FEW_SPARED]

    def _weights(self, x: torch.Tensor, outputs: int) -> list[torch.Tensor]:
        """Random ``[outputs, in_features]``, other memory for each layer as far as that is more than a cache holds."""
        each = outputs * x.shape[-1]
        copies = min(-(-_COLD_BYTES // (each * x.element_size())), LAYERS)
        if self._memory.dtype != x.dtype or self._memory.device != x.device or self._memory.numel() < copies * each:
            self.clear()
            self._memory = torch.randn(copies * each, dtype=x.dtype, device=x.device).mul_(0.02)
        return [self._memory[i % copies * each :][:each].view(outputs, -1) for i in range(LAYERS)]

    def _layers(self, x: torch.Tensor, weights: Sequence[LoRALayerWeights], plan: LoRAPlan) -> Iterator[Layer]:
        adapters, pages = _adapters(weights), _pages(weights)
        if not adapters:
            return
        own = self._weights(x, sum(w.B.shape[1] for w in weights))
        alike = [[w for w in plan.layers if (w.A.shape, w.B.shape) == (m.A.shape, m.B.shape)] for m in weights]
        for i in range(LAYERS):
            chosen = [some[(i * len(weights) + j) % len(some)] for j, some in enumerate(alike)]
            yield own[i], [_full(w, adapters, pages) for w in chosen]


def _pages(weights: Sequence[LoRALayerWeights]) -> int:
    """Pages of an adapter of ``_RANK``, or of as much as there is room for."""
    return min(min(-(-_RANK // w.page_rows), len(w.A) // w.page_rows) for w in weights)


def _adapters(weights: Sequence[LoRALayerWeights]) -> int:
    """How many of those there is room for, up to ``TIMED_ADAPTERS``."""
    pages = _pages(weights)
    if not pages:
        return 0
    return min(TIMED_ADAPTERS, *(min(slots_of(w), len(w.A) // w.page_rows // pages) for w in weights))


def slots_of(w: LoRALayerWeights) -> int:
    """How many adapters its tables can hold. The host's tables grow with what is there, those on a device do not."""
    return len(w.rank if w.rank_t is None else w.rank_t)


def _full(w: LoRALayerWeights, adapters: int, pages: int) -> LoRALayerWeights:
    """The same memory, whatever is in it, as if it held adapters one after another."""
    table = np.arange(adapters * pages, dtype=np.int32).reshape(adapters, pages)
    ranks = np.full(adapters, min(_RANK, pages * w.page_rows), np.int32)
    ones = np.ones(adapters, np.float32)
    return LoRALayerWeights(w.A, w.B, w.page_rows, table, ranks, ones, ones.astype(bool), workspace=w.workspace)


def _tiles(slots: np.ndarray, plan: LoRAPlan) -> LoRATiles:
    """Of rows with these slots, with room for as many as the plan's."""
    assert plan.tiles is not None
    size, room = plan.tiles.tile_rows, plan.tiles.max_tiles
    made = [np.zeros(n, np.int32) for n in (room * size, room, room)]
    write_tiles(slots, *made, tile_rows=size, has_base=True)
    device = plan.tiles.lens.device
    return LoRATiles(*(torch.from_numpy(array).to(device) for array in made), size, has_base=True)


def _run(way: Callable[[Layer, LoRAPlan], object], layers: Sequence[Layer], plan: LoRAPlan, tiles: LoRATiles) -> None:
    """All layers, in a pass of its own: what is derived once a pass is derived here."""
    weights = [w for _, some in layers for w in some]
    fresh = LoRAPlan(plan.slots, plan.starts, backend=plan.backend, tiles=tiles, layers=weights, fuses=plan.fuses)
    for layer in layers:
        way(layer, fresh)


def _is_computed(way: Callable[[Layer, LoRAPlan], object], layers: Sequence[Layer], plan: LoRAPlan) -> bool:
    """Whether it computes anything, of a pass of one layer."""
    found: list[object] = []
    assert plan.tiles is not None
    _run(lambda layer, fresh: found.append(way(layer, fresh)), layers[:1], plan, plan.tiles)
    return found[0] is not None


def _add_behind(x: torch.Tensor, layer: Layer, plan: LoRAPlan, spared: int, activation: Activation | None) -> None:
    weight, weights = layer
    begun = lora.begin_lora(x, weights, plan)
    with spare_multiprocessors(spared):
        ys = functional.linear(x, weight).split([w.B.shape[1] for w in weights], dim=1)
    if activation is not None:
        lora.lora_gate(ys[0], ys[1], x, weights, plan, activation, begun)
    elif begun is not None:
        begun.finish_(ys)
    else:
        lora.add_lora_group_(ys, x, weights, plan)


def _add_beside(
    beside: PartsBeside, x: torch.Tensor, spared: int, activation: Activation | None, layer: Layer, plan: LoRAPlan
) -> None:
    weight, weights = layer
    widths = [w.B.shape[1] for w in weights]
    ys, parts = beside.compute(x, weights, plan, lambda: functional.linear(x, weight).split(widths, dim=1), spared)
    if activation is not None:
        glue.implementation("triton").gated(ys[0], ys[1], activation, parts)


def _best(times: dict[ProductPlan, float], usual: ProductPlan) -> ProductPlan:
    found = min(times, key=lambda plan: times[plan])
    logger.debug("%s", {f"{plan.way} {plan.spared}": f"{ms * 1e3 / LAYERS:.1f} us" for plan, ms in times.items()})
    return found if times[found] < _BETTER * times[usual] else usual
