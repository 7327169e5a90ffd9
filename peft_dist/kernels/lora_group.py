"""What a launch of the Triton LoRA kernels is made of, once its layers are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from peft_dist.kernels.lora_plans import RANKS, GroupPlan, GroupShape, plan_for, tile_count
from peft_dist.kernels.lora_tables import LayerTables, layer_tables
from peft_dist.kernels.lora_tiles import DECODE_TILE_ROWS, LoRATiles, choose_tile_rows, max_tiles, write_tiles
from peft_dist.kernels.lora_workspace import LoRAWorkspace
from peft_dist.kernels.transfer import to_device
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan

if TYPE_CHECKING:
    from peft_dist.kernels.lora_lookup_triton import Lookup

MOST_LAYERS = 3
# Triton compiles a kernel once for tensors that begin at multiples of 16 bytes, and once more for others.
_ALIGNED = 4

T = TypeVar("T")


class Arguments(NamedTuple):
    """What a group's layers are to the kernels, which always take three; of these versions of their weights."""

    versions: list[int]
    shrink: tuple[Any, ...]
    expand: tuple[Any, ...]


@dataclass(slots=True)
class Group:
    """Up to three layers that read one input."""

    weights: tuple[LoRALayerWeights, ...]
    dtype: torch.dtype
    page_rows: int
    in_features: int
    out_features: tuple[int, ...]
    device_name: str
    _arguments: Arguments | None = None

    @property
    def size(self) -> int:
        """Layers."""
        return len(self.weights)

    def arguments(self, lookup: Lookup | None = None) -> Arguments:
        """Made once a version: a step without a graph is bound by such work on the host."""
        if lookup is not None:
            return _arguments([lookup.tables_of(weights) for weights in self.weights], [])
        versions = [weights.version for weights in self.weights]
        held = self._arguments
        if held is None or held.versions != versions:
            held = self._arguments = _arguments([layer_tables(weights) for weights in self.weights], versions)
        return held

    def plan(self, tiles: LoRATiles, wide: bool, given: GroupPlan | None = None, ranks: int = RANKS) -> GroupPlan:
        """How to launch it. Tiles are counted coarsely, so that many batch sizes share a compiled kernel."""
        if given is not None:
            return given.in_float32() if wide else given
        count = tile_count(tiles.max_tiles, tiles.tile_rows)
        ranks = ranks if tiles.tile_rows == DECODE_TILE_ROWS else RANKS
        shape = GroupShape(tiles.tile_rows, count, self.in_features, self.out_features, ranks)
        return plan_for(shape, self.device_name, wide)

    def workspace(self) -> LoRAWorkspace:
        """That of the pool; weights without one have their own."""
        first = self.weights[0]
        if first.workspace is not None:
            return first.workspace
        found = first.scratch.get("workspace")
        if not isinstance(found, LoRAWorkspace):
            found = first.scratch["workspace"] = LoRAWorkspace(first.A.device)
        found.admit(max(int(weights.rank.max(initial=0)) for weights in self.weights))
        return found


def group_of(weights: Sequence[LoRALayerWeights]) -> Group:
    """The group of these layers, kept with the first of them.

    Raises:
        ValueError: the layers cannot be launched together.
    """
    held = weights[0].scratch.get("triton_group")
    if isinstance(held, Group) and len(held.weights) == len(weights) and all(map(is_, held.weights, weights)):
        return held
    kinds = {(w.A.dtype, w.page_rows, w.A.shape[1]) for w in weights}
    if len(kinds) > 1 or len(weights) > MOST_LAYERS:
        raise ValueError(
            f"LoRA: one launch takes up to {MOST_LAYERS} layers of one dtype, page size and input, not "
            f"{len(weights)} of {sorted(map(str, kinds))}"
        )
    [(dtype, page_rows, in_features)] = kinds
    device = weights[0].A.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    group = Group(tuple(weights), dtype, page_rows, in_features, tuple(w.B.shape[1] for w in weights), name)
    weights[0].scratch["triton_group"] = group
    return group


def _arguments(tables: Sequence[LayerTables], versions: list[int]) -> Arguments:
    layers = three(tables)
    shrink, expand = (layer.of_shrink() for layer in layers), (layer.of_expand() for layer in layers)
    return Arguments(versions, tuple(chain(*shrink)), tuple(chain(*expand)))


def tiles_of(plan: LoRAPlan, device: torch.device) -> LoRATiles:
    """A plan's tiles, made from its runs once where it came without."""
    if plan.tiles is not None:
        return plan.tiles
    found = plan.scratch.get("tiles")
    if found is None:
        found = plan.scratch["tiles"] = make_tiles(np.repeat(plan.slots, np.diff(plan.starts)), device, has_base=True)
    assert isinstance(found, LoRATiles)
    return found


def watched_tile(tiles: LoRATiles) -> int:
    """The tile whose use tells that many are used: they are filled from the first on."""
    return min(max(1, tiles.max_tiles // 4), tiles.max_tiles - 1)


def make_tiles(
    row_slots: np.ndarray, device: torch.device, tile_rows: int | None = None, *, has_base: bool = False
) -> LoRATiles:
    """Tiles of a batch with these slots (int ``[rows]``), as many as it needs, brought to the device by one copy."""
    size = choose_tile_rows(row_slots) if tile_rows is None else tile_rows
    room = max_tiles(len(row_slots), len(row_slots), size, has_base=has_base)
    rows, slots, lens = np.zeros(room * size, np.int32), np.zeros(room, np.int32), np.zeros(room, np.int32)
    used = max(1, write_tiles(row_slots, rows, slots, lens, tile_rows=size, has_base=has_base))
    places = used * size
    room = -(-used // _ALIGNED) * _ALIGNED
    packed = np.zeros(places + 2 * room, np.int32)
    for begin, array, count in ((0, rows, places), (places, slots, used), (places + room, lens, used)):
        packed[begin : begin + count] = array[:count]
    whole = to_device(torch.from_numpy(packed), device)
    pieces = whole[:places], whole[places:][:used], whole[places + room :][:used]
    return LoRATiles(*pieces, tile_rows=size, has_base=has_base, with_adapter=int(np.count_nonzero(slots[:used] >= 0)))


def even_rows(name: str, tensor: torch.Tensor, num_rows: int, width: int) -> torch.Tensor:
    """``[num_rows, width]`` of unit stride; x is copied where its rows do not lie evenly, y must.

    Raises:
        ValueError: the tensor has other rows or columns.
    """
    if tensor.shape[-1] != width or tensor.numel() != num_rows * width:
        raise ValueError(
            f"LoRA: the plan and the layer's weights need {name} {[num_rows, width]}, not {list(tensor.shape)}"
        )
    rows = tensor.view(num_rows, width) if name == "y" else tensor.reshape(num_rows, width)
    if rows.stride(1) != 1 and width > 1:
        if name == "y":
            raise ValueError(f"LoRA: y must have unit stride in its last dimension, not {tensor.stride()}")
        rows = rows.contiguous()
    return rows


def three(items: Sequence[T]) -> list[T]:
    """The kernels take three of each; those that a smaller group lacks are never used."""
    return [*items, *[items[0]] * (MOST_LAYERS - len(items))]


def is_wide(*dtypes: torch.dtype) -> bool:
    """Whether a product of these types is computed in float32: one of them is, or they differ."""
    return torch.float32 in dtypes or len(set(dtypes)) > 1
