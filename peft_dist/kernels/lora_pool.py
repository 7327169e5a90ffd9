"""Device memory behind adapter slots: all resident adapters, stacked by rank rows in each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from peft_dist.kernels.row_allocator import RowAllocator
from peft_dist.kernels.types import LoRALayerWeights

LayerTensors = tuple[torch.Tensor, torch.Tensor, float]
"""A ``[r, in_features]``, B ``[out_features, r]`` as PEFT stores them, and the scaling."""


@dataclass(slots=True)
class _Layer:
    """One layer's stack; ``weights`` outlives its adapters so that kernels keep what they derived."""

    in_features: int
    out_features: int
    weights: LoRALayerWeights
    rows: RowAllocator = field(default_factory=RowAllocator)

    @property
    def num_resident(self) -> int:
        return int(np.count_nonzero(self.weights.rank))


class LoRAPool:
    """Adapters by slot in every LoRA layer of one model.

    A layer stores an adapter in as many rows as its rank there, and nothing where it does not adapt the
    layer. Buffers start empty and double when rows run out.

    Attributes:
        weights: What kernels read, by ``lora_index``; None while no resident adapter adapts the layer.
    """

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        self.device = torch.device(device)
        self.dtype = dtype
        self.weights: list[LoRALayerWeights | None] = []
        self._layers: list[_Layer] = []
        self._targets: dict[int, frozenset[int]] = {}

    def add_layer(self, in_features: int, out_features: int, *, embedding: bool = False) -> int:
        """Register a layer and return its ``lora_index``.

        For an embedding ``in_features`` is the number of embeddings; an adapter's A is then ``[r, that]``.
        """
        del embedding  # Both kinds are stored alike; the argument documents the call.
        weights = LoRALayerWeights(
            A=torch.zeros(0, in_features, dtype=self.dtype, device=self.device),
            B=torch.zeros(0, out_features, dtype=self.dtype, device=self.device),
            row_start=np.zeros(0, np.int32),
            rank=np.zeros(0, np.int32),
            scaling=np.zeros(0, np.float32),
        )
        self._layers.append(_Layer(in_features, out_features, weights))
        self.weights.append(None)
        return len(self._layers) - 1

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers, rows that are free included."""
        return sum(t.numel() * t.element_size() for layer in self._layers for t in (layer.weights.A, layer.weights.B))

    def load(self, slot: int, weights: Mapping[int, LayerTensors]) -> None:
        """Put an adapter into a slot, over whatever it held. ``weights`` is keyed by ``lora_index``.

        Raises:
            ValueError: a tensor does not fit its layer, or the slot is negative; nothing has changed then.
        """
        if slot < 0:
            raise ValueError(f"adapter slot {slot} is negative: slots count from 0")
        for index, tensors in weights.items():
            self._check_fits(index, tensors)
        targets = frozenset(weights)
        with torch.no_grad():
            for index in self._targets.get(slot, frozenset()) - targets:
                self._clear(index, slot)
            self._targets[slot] = targets
            for index, (A, B, scaling) in weights.items():
                self._store(index, slot, A, B, scaling)

    def drop(self, slot: int) -> None:
        """Free a slot's rows in every layer. A slot that holds nothing is left as it is."""
        with torch.no_grad():
            for index in self._targets.pop(slot, frozenset()):
                self._clear(index, slot)

    def check(self) -> None:
        """Raises RuntimeError unless every row has at most one owner and free rows are exactly the rest."""
        for index, layer in enumerate(self._layers):
            held = layer.weights
            owned = sorted((int(held.row_start[s]), int(held.rank[s])) for s in np.flatnonzero(held.rank))
            problem = layer.rows.find_inconsistency(owned)
            slots = {s for s, targets in self._targets.items() if index in targets}
            if slots != set(np.flatnonzero(held.rank).tolist()):
                problem = f"slots {sorted(slots)} are registered, ranks say {held.rank.tolist()}"
            if layer.rows.capacity != held.A.shape[0] or held.A.shape[0] != held.B.shape[0]:
                problem = f"{layer.rows.capacity} rows are managed, A and B have {held.A.shape[0]}, {held.B.shape[0]}"
            if (self.weights[index] is not None) != bool(layer.num_resident):
                problem = "weights are published exactly while an adapter is resident, but are not"
            if problem:
                raise RuntimeError(f"LoRA pool, layer {index}: {problem}")

    def _check_fits(self, index: int, tensors: LayerTensors) -> None:
        if not 0 <= index < len(self._layers):
            raise ValueError(f"LoRA layer {index} does not exist: the pool has {len(self._layers)}")
        layer, (A, B, _) = self._layers[index], tensors
        rank = A.shape[0] if A.dim() == 2 else 0
        if rank < 1 or A.shape != (rank, layer.in_features) or B.shape != (layer.out_features, rank):
            raise ValueError(
                f"LoRA layer {index} takes A [r, {layer.in_features}] and B [{layer.out_features}, r] with r >= 1, "
                f"not A {list(A.shape)} and B {list(B.shape)}"
            )

    def _store(self, index: int, slot: int, A: torch.Tensor, B: torch.Tensor, scaling: float) -> None:
        layer, rank = self._layers[index], A.shape[0]
        self._fit_slots(layer.weights, slot)
        held = layer.weights
        if held.rank[slot] != rank:
            self._clear(index, slot)
            held.row_start[slot] = self._take_rows(layer, rank)
            held.rank[slot] = rank
        first = int(held.row_start[slot])
        held.A[first : first + rank].copy_(A)
        held.B[first : first + rank].copy_(B.T)
        held.scaling[slot] = scaling
        held.version += 1
        self.weights[index] = held

    @staticmethod
    def _fit_slots(held: LoRALayerWeights, slot: int) -> None:
        missing = slot + 1 - len(held.rank)
        if missing > 0:
            missing = max(missing, len(held.rank))
            held.row_start = np.pad(held.row_start, (0, missing))
            held.rank = np.pad(held.rank, (0, missing))
            held.scaling = np.pad(held.scaling, (0, missing))

    @staticmethod
    def _take_rows(layer: _Layer, rank: int) -> int:
        """First of ``rank`` free rows; the buffers grow when there are none."""
        first = layer.rows.allocate(rank)
        if first is None:
            held, old = layer.weights, layer.rows.capacity
            grown = max(2 * old, old + rank)
            held.A, held.B = (_with_rows(tensor, grown) for tensor in (held.A, held.B))
            layer.rows.grow(grown)
            first = layer.rows.allocate(rank)
            assert first is not None, "the buffers grew by at least the rank"
        return first

    def _clear(self, index: int, slot: int) -> None:
        layer = self._layers[index]
        held = layer.weights
        rank, first = int(held.rank[slot]), int(held.row_start[slot])
        if not rank:
            return
        held.rank[slot] = 0
        held.scaling[slot] = 0.0
        held.version += 1
        layer.rows.free(first, rank)
        if not layer.num_resident:
            self.weights[index] = None


def _with_rows(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A copy with more rows; the new ones hold anything until an adapter is stored there."""
    grown = tensor.new_empty(num_rows, tensor.shape[1])
    grown[: len(tensor)].copy_(tensor)
    return grown
