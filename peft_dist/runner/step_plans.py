"""What a captured step's LoRA products go by: device tensors that each replay fills anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peft_dist.kernels.lora_tiles import LoRATiles
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan
from peft_dist.runner.step_buffer import TILE_ROWS, PlanBuffers, TileBuffers
from peft_dist.runner.step_variants import Variant


def plans_of(
    variant: Variant, layers: Sequence[LoRALayerWeights], backend: str, plans: PlanBuffers, rows: int
) -> tuple[LoRAPlan | None, LoRAPlan | None]:
    """For adapters' parts to be added and, where an adapter is merged into rows of others, to be taken away.

    Args:
        layers: Of the pool, whose tables are on the device.
    """
    if not variant.lora:
        return None, None
    added = make_plan(layers, backend, plans.added, rows, 1.0, variant.fuses)
    return added, make_plan(layers, backend, plans.taken, rows, -1.0) if variant.corrected else None


def make_plan(
    layers: Sequence[LoRALayerWeights], backend: str, tiles: TileBuffers, rows: int, factor: float, fuses: bool = False
) -> LoRAPlan:
    """Of so many rows, whose tiles each replay finds on the device."""
    return LoRAPlan(
        slots=np.zeros(1, np.int32),
        starts=np.array([0, rows], np.int32),
        backend=backend,
        factor=factor,
        tiles=LoRATiles(tiles.rows, tiles.slots, tiles.lens, TILE_ROWS, has_base=True),
        layers=layers,
        fuses=fuses,
    )
