"""What is left for rank intermediates is enough for any step with adapters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.kernels import lora_plans, lora_room, lora_triton
from peft_dist.kernels.lora_group import make_tiles
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.kernels.lora_tiles import TILE_ROWS
from peft_dist.kernels.types import LoRAPlan

INPUTS = (64, 768, 4096, 14336)


class Nowhere:
    """A kernel that is not run."""

    def __getitem__(self, grid: object) -> Any:
        return lambda *args, **known: None


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_triton, "shrink_kernel", Nowhere())
    monkeypatch.setattr(lora_triton, "lookup_of", lambda *args: SimpleNamespace(tables_of=lambda w: args))
    monkeypatch.setattr("peft_dist.kernels.lora_group._arguments", lambda *args: SimpleNamespace(shrink=()))


def shrink(in_features: int, layers: int, slots: np.ndarray, tile_rows: int | None, pool: LoRAPool) -> int:
    """Bytes that the workspace has behind it."""
    weights = [pool._layers[pool.add_layer(in_features, 32)].weights for _ in range(layers)]
    tiles = make_tiles(slots, torch.device("cpu"), tile_rows, has_base=True)
    plan = LoRAPlan(slots[:1], np.array([0, len(slots)], np.int32), backend="triton", tiles=tiles, layers=weights)
    lora_triton.lora_shrink_group(torch.empty(len(slots), in_features), weights, plan)
    return pool.workspace.num_bytes


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(INPUTS), st.integers(1, 3), st.integers(1, 80), st.sampled_from([1, 16, 64, 100, 256]),
    st.sampled_from([None, *TILE_ROWS]), st.integers(1, 3000), st.integers(0, 2**32 - 1), st.booleans(),
)  # fmt: skip
def test_no_step_takes_more(
    in_features: int, layers: int, num_slots: int, rank: int, tile_rows: int | None, rows: int, seed: int, even: bool
) -> None:
    random = np.random.default_rng(seed)
    slots = random.integers(-1, num_slots, rows).astype(np.int32)
    if even:
        # As many tiles as there can be: one row of each, and the rest of one.
        slots = np.concatenate((np.arange(-1, num_slots), np.zeros(rows)))[:rows].astype(np.int32)
    pool = LoRAPool("cpu", torch.float32, num_rows=8, num_slots=num_slots)
    pool.workspace.admit(rank)
    pool.workspace.per_rank = 0
    taken = shrink(in_features, layers, slots, tile_rows, pool)
    pool.workspace.per_rank = lora_room.most_per_rank(INPUTS, rows, num_slots, rank, "cpu")
    assert taken <= pool.workspace.bytes_with(rank)


def test_a_buffer_is_as_large_as_the_largest_step_needs_from_the_first_on() -> None:
    pool = LoRAPool("cpu", torch.float32, num_rows=8, num_slots=8)
    pool.workspace.per_rank = lora_room.most_per_rank([64], 512, 8, 128, "cpu")
    few = shrink(64, 1, np.zeros(1, np.int32), None, pool)
    assert shrink(64, 3, np.arange(512, dtype=np.int32) % 8, 16, pool) == few
    assert 0 < few <= pool.workspace.bytes_with(64) < pool.workspace.bytes_with(65)
    pool.workspace.admit(128)
    many = shrink(64, 1, np.zeros(1, np.int32), None, pool)
    assert few < many <= pool.workspace.bytes_with(128)


def test_measured_plans_count(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = lora_room.most_per_rank([4096], 256, 8, 16, "a card")
    shape = lora_plans.GroupShape(16, 64, 4096, (4096,) * 3)
    plan = lora_plans.GroupPlan(64, 64, 64)
    monkeypatch.setattr(lora_room, "tables_of", lambda name: ((shape, plan),) if name == "a card" else ())
    assert lora_room.most_per_rank([4096], 256, 8, 16, "a card") >= 64 / 16 * usual
    assert lora_room.most_per_rank([4096], 256, 8, 16, "another") == usual
