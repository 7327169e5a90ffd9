"""LoRA in a CUDA graph: the same launches, replayed for other rows, slots, adapters and ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_dist.kernels import lora
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.kernels.lora_tiles import LoRATiles, max_tiles, write_tiles
from peft_dist.kernels.types import LoRAPlan
from tests.kernels.lora_cases import POPULARITIES, assert_added, plan_of_rows, popularity, random_rows

pytestmark = pytest.mark.gpu
NUM_ROWS, NUM_SLOTS, SIZES = 40, 8, (4096, [4096, 1024, 1024])


@pytest.fixture
def pool() -> LoRAPool:
    pool = LoRAPool("cuda", torch.bfloat16, num_rows=512, num_slots=NUM_SLOTS)
    for out in SIZES[1]:
        pool.add_layer(SIZES[0], out)
    return pool


def load(pool: LoRAPool, slot: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = [torch.randn(rank, SIZES[0], generator=generator) / 64 for _ in SIZES[1]]
    B = [torch.randn(out, rank, generator=generator) for out in SIZES[1]]
    pool.load(slot, {i: (a, b, 0.5) for i, (a, b) in enumerate(zip(A, B, strict=True))})


def test_a_captured_launch_serves_any_batch_and_any_adapters(pool: LoRAPool) -> None:
    for slot in range(NUM_SLOTS):
        load(pool, slot, 16, slot)
    room = max_tiles(NUM_ROWS, NUM_SLOTS, 16)
    host = [torch.zeros(size, dtype=torch.int32).pin_memory() for size in (room * 16, room, room)]
    device = [tensor.cuda() for tensor in host]
    plan = LoRAPlan(
        np.zeros(1, np.int32),
        np.array([0, NUM_ROWS], np.int32),
        backend="triton",
        tiles=LoRATiles(*device, tile_rows=16),
    )
    x = torch.zeros(NUM_ROWS, SIZES[0], dtype=torch.bfloat16, device="cuda")
    wide = torch.zeros(NUM_ROWS, sum(SIZES[1]), dtype=torch.bfloat16, device="cuda")
    ys = wide.split(SIZES[1], dim=1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        lora.add_lora_group_(ys, x, pool.weights, plan)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        lora.add_lora_group_(ys, x, pool.weights, plan)
    for step, kind in enumerate(POPULARITIES):
        # Padded rows are in no tile; ranks change under the captured launches, which have room for 64.
        slots = popularity(kind, NUM_ROWS - 3 * step, NUM_SLOTS, seed=step)
        load(pool, step, (1, 8, 20, 64, 33)[step], 100 + step)
        write_tiles(slots, *(tensor.numpy() for tensor in host), tile_rows=16)
        for target, source in zip(device, host, strict=True):
            target.copy_(source, non_blocking=True)
        x.copy_(random_rows("cuda", *x.shape, dtype=x.dtype, seed=step))
        before = random_rows("cuda", *wide.shape, dtype=x.dtype, seed=50 + step)
        wide.copy_(before)
        pool.workspace.take(0).fill_(float("nan"))
        graph.replay()
        padded = np.concatenate([slots, np.full(NUM_ROWS - len(slots), -1, np.int32)])
        for got, was, weights in zip(ys, before.split(SIZES[1], dim=1), pool.weights, strict=True):
            assert weights is not None
            assert_added(got, was, x, weights, plan_of_rows(padded))


def test_nothing_waits_for_the_device(pool: LoRAPool) -> None:
    for slot in range(NUM_SLOTS):
        load(pool, slot, 8, slot)
    plan = plan_of_rows(popularity("uniform", NUM_ROWS, NUM_SLOTS))
    x, ys = (
        random_rows("cuda", NUM_ROWS, SIZES[0], dtype=torch.bfloat16),
        [random_rows("cuda", NUM_ROWS, out, dtype=torch.bfloat16) for out in SIZES[1]],
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        lora.add_lora_group_(ys, x, pool.weights, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
