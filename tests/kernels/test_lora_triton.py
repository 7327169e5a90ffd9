"""The Triton LoRA kernels against the plain twin: in the interpreter on tiny shapes, and compiled on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_dist.kernels import lora, lora_triton, reference
from peft_dist.kernels.lora_gate_triton import lora_expand_gate
from peft_dist.kernels.lora_group import make_tiles
from peft_dist.kernels.lora_pool import LoRAPool
from peft_dist.kernels.lora_tiles import LoRATiles, max_tiles, write_tiles
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan
from tests.kernels.lora_cases import (
    DEVICES,
    POPULARITIES,
    SHARED_SLOT_RANKS,
    assert_added,
    layers_of,
    plan_of_rows,
    popularity,
    random_rows,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.parametrize("device", DEVICES)


def sizes_on(device: str) -> tuple[int, list[int]]:
    """Inputs, and outputs of three layers: no multiples of a block."""
    return (40, [24, 33, 5]) if device == "cpu" else (4100, [4096, 1030, 5])


def check_group(
    device: str,
    ranks: list[list[int]],
    sizes: tuple[int, list[int]],
    plan: LoRAPlan,
    dtype: torch.dtype,
    pool_dtype: torch.dtype | None = None,
) -> None:
    """Outputs are columns of one wide tensor, which has more columns than that."""
    in_features, outs = sizes
    layers = layers_of(device, ranks, in_features, outs, pool_dtype or dtype, seed=3)
    x = random_rows(device, plan.num_rows, in_features, dtype=dtype, seed=1)
    wide = random_rows(device, plan.num_rows, sum(outs) + 3, dtype=dtype, seed=2)
    before = wide.clone()
    lora.add_lora_group_(wide[:, : sum(outs)].split(outs, dim=1), x, layers, plan)
    split = zip(wide[:, :-3].split(outs, dim=1), before[:, :-3].split(outs, dim=1), layers, strict=True)
    for got, untouched, weights in split:
        assert_added(got, untouched, x, weights, plan)
    assert torch.equal(wide[:, -3:], before[:, -3:]), "wrote outside of y"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", POPULARITIES)
def test_popularities(device: str, kind: str, dtype: torch.dtype) -> None:
    num_rows = 21 if device == "cpu" else 133
    ranks = [[8, 1, 16, 0, 20], [8, 4, 0, 3, 20], [0, 1, 17, 3, 8]]
    if device == "cuda":
        ranks = [list(SHARED_SLOT_RANKS), list(reversed(SHARED_SLOT_RANKS)), [128, 64, 0, 16, 8, 4, 1, 33]]
    plan = plan_of_rows(popularity(kind, num_rows, len(ranks[0]), seed=5))
    check_group(device, ranks, sizes_on(device), plan, dtype)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 33, 133])
def test_awkward_numbers_of_rows(device: str, num_rows: int) -> None:
    ranks, outs = [[8, 3], [4, 16]], [24, 33] if device == "cpu" else [1030, 4096]
    plan = plan_of_rows(popularity("skewed", num_rows, 2, seed=num_rows))
    check_group(device, ranks, (40, outs), plan, torch.float16)


@pytest.mark.parametrize("rank", [1, 4, 8, 16, 64, 128])
def test_ranks(device: str, rank: int) -> None:
    in_features, outs = (40, [24]) if device == "cpu" else (4096, [4096])
    check_group(device, [[rank, 2]], (in_features, outs), plan_of_rows(np.array([0, 1, 0, -1])), torch.float16)


@pytest.mark.parametrize(
    ("dtype", "pool_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_adapters_of_another_type(device: str, dtype: torch.dtype, pool_dtype: torch.dtype) -> None:
    plan = plan_of_rows(np.array([1, 0, -1, 0, 1]))
    check_group(device, [[8, 17], [3, 0], [1, 2]], sizes_on(device), plan, dtype, pool_dtype)


@pytest.mark.parametrize("tile_rows", [16, 32, 64, 128])
def test_tiles_of_every_size_and_unused_ones_behind_them(device: str, tile_rows: int) -> None:
    """As in a captured step: more tiles than are used, in arrays whose other entries hold anything."""
    in_features, outs = sizes_on(device)
    slots = popularity("zipf", 45 if device == "cpu" else 300, 3, seed=tile_rows)
    room = max_tiles(len(slots), 3, tile_rows) + 2
    arrays = [np.full(size, 12345, np.int32) for size in (room * tile_rows, room, room)]
    write_tiles(slots, *arrays, tile_rows=tile_rows)
    plan = plan_of_rows(slots)
    plan.tiles = LoRATiles(*(torch.from_numpy(a).to(device) for a in arrays), tile_rows=tile_rows)
    check_group(device, [[8, 17, 1], [8, 0, 3]], (in_features, outs[:2]), plan, torch.float16)


def test_what_a_correction_takes_away_is_what_was_added(device: str) -> None:
    slots = popularity("uniform", 9, 3)
    check_group(device, [[8, 3, 16]], (40, [24]), plan_of_rows(slots, factor=-1.0), torch.float32)


def test_two_halves_on_a_workspace_of_the_caller(device: str) -> None:
    """The shrink needs x alone, the expand y; layers that nobody adapts are passed over."""
    in_features, outs = sizes_on(device)
    layers = layers_of(device, [[8, 3], [4, 0], [1, 2]], in_features, outs, torch.float16, seed=1)
    plan = plan_of_rows(np.array([1, 0, -1, 1]))
    x = random_rows(device, 4, in_features, dtype=torch.float16)
    ys = [random_rows(device, 4, out, dtype=torch.float16, seed=out) for out in outs]
    before = [y.clone() for y in ys]
    some: list[LoRALayerWeights | None] = [layers[0], None, layers[2]]
    workspace = lora_triton.LoRAWorkspace(device)
    lora_triton.lora_shrink_group(x, some, plan, workspace)
    lora_triton.lora_expand_group_(ys, some, plan, workspace)
    assert torch.equal(ys[1], before[1])
    for index in (0, 2):
        assert_added(ys[index], before[index], x, layers[index], plan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 24.0])
def test_embedding(device: str, dtype: torch.dtype, scale: float | None) -> None:
    width = 24 if device == "cpu" else 4096
    [weights] = layers_of(device, [[8, 0, 17, 1]], 50, [width], dtype, seed=2)
    slots = popularity("uniform", 20, 4, seed=1)
    plan = plan_of_rows(slots)
    # The base's rows are in tiles of their own, which have nothing to do.
    plan.tiles = make_tiles(slots, torch.device(device), 16, has_base=True)
    ids = torch.randint(50, (20,), generator=torch.Generator().manual_seed(0)).to(device)
    y = random_rows(device, 20, width, dtype=dtype)
    got = lora.add_embedding_lora_(y.clone(), ids, weights, plan, scale)
    exact = reference.add_embedding_lora_(y.float().clone(), ids, weights, plan, scale)
    assert (got.float() - exact).norm() <= torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("adapted", [(True, True), (True, False), (False, True)])
def test_the_fused_gate_covers_all_rows(device: str, activation: str, adapted: tuple[bool, bool]) -> None:
    in_features, width = (40, 33) if device == "cpu" else (4096, 14336)
    layers = layers_of(device, [[8, 3, 0], [4, 17, 0]], in_features, [width] * 2, torch.float16, seed=1)
    weights = [layer if is_adapted else None for layer, is_adapted in zip(layers, adapted, strict=True)]
    slots = popularity("uniform", 19, 3, seed=4)
    plan = plan_of_rows(slots)
    plan.tiles = make_tiles(slots, torch.device(device), 16, has_base=True)
    x = random_rows(device, 19, in_features, dtype=torch.float16)
    joined = random_rows(device, 19, 2 * width, dtype=torch.float16, seed=1)
    gate, up = joined.split(width, dim=1)
    exact = reference.lora_gate(gate.float(), up.float(), x, weights, plan, activation)
    out = torch.full((19, width), float("nan"), dtype=torch.float16, device=device)
    lora_triton.lora_shrink_group(x, weights, plan)
    assert lora_expand_gate(gate, up, weights, plan, activation, out) is out
    assert (out.float() - exact).norm() <= 1e-3 * exact.norm()
    plan.tiles = make_tiles(slots, torch.device(device), 16)
    with pytest.raises(ValueError, match="has_base"):
        lora_expand_gate(gate, up, weights, plan, activation)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_broken_adapter_and_broken_rows_reach_no_other(device: str) -> None:
    plan = plan_of_rows(np.array([0, 1, 1, 2, -1, 2]))
    [weights] = layers_of(device, [[2, 3, 4]], 40, [33], torch.float16, seed=1)
    x, y = (random_rows(device, 6, n, dtype=torch.float16) for n in (40, 33))
    expected = lora.add_lora_(y.clone(), x, weights, plan)
    weights.B[int(weights.rows_of(1)[0])] = float("inf")
    x[5] = float("nan")
    got = lora.add_lora_(y.clone(), x, weights, plan)
    assert not torch.isfinite(got[[1, 2, 5]]).any()
    assert torch.equal(got[[0, 3, 4]], expected[[0, 3, 4]])


def test_a_row_gets_the_same_bits_in_any_place_of_a_batch(device: str) -> None:
    [weights] = layers_of(device, [[5, 8, 0, 17]], 70, [90], torch.float16, seed=2)
    slots = popularity("uniform", 24, 4, seed=3)
    x, y = (random_rows(device, 24, n, dtype=torch.float16) for n in (70, 90))
    together = lora.add_lora_(y.clone(), x, weights, plan_of_rows(slots))
    for order in (np.arange(24)[::-1].copy(), np.random.default_rng(0).permutation(24)):
        turned = lora.add_lora_(y[order].clone(), x[order], weights, plan_of_rows(slots[order]))
        assert torch.equal(turned, together[order])


def test_sizes_that_do_not_fit_are_refused(device: str) -> None:
    [weights] = layers_of(device, [[2]], 40, [24], torch.float32, seed=0)
    plan = plan_of_rows(np.zeros(4, np.int32))
    for rows, inputs, outputs in ((3, 40, 24), (4, 39, 24), (4, 40, 25)):
        with pytest.raises(ValueError, match="the plan and the layer"):
            lora.add_lora_(
                torch.zeros(rows, outputs, device=device), torch.zeros(rows, inputs).to(device), weights, plan
            )
    others = layers_of(device, [[2]], 41, [24], torch.float32, seed=0)
    with pytest.raises(ValueError, match="one launch takes"):
        lora_triton.lora_shrink_group(torch.zeros(4, 40, device=device), [weights, *others], plan)


def test_an_adapter_that_comes_later_is_seen(device: str) -> None:
    """Where the pool has no tables on the device, copies of the host's follow its versions; a high rank finds room."""
    [weights] = layers_of(device, [[2, 0]], 40, [24], torch.float32, seed=0)
    plan = plan_of_rows(np.array([0, 1, 1]))
    x, y = (random_rows(device, 3, n, dtype=torch.float32) for n in (40, 24))
    assert_added(lora.add_lora_(y.clone(), x, weights, plan), y, x, weights, plan)
    pool = LoRAPool(device, torch.float32, num_rows=256, num_slots=2)
    pool.add_layer(40, 24)
    generator = torch.Generator().manual_seed(0)
    for slot, rank in ((0, 3), (1, 140), (0, 9)):
        pool.load(
            slot, {0: (torch.randn(rank, 40, generator=generator), torch.randn(24, rank, generator=generator), 1.0)}
        )
        [weights] = [w for w in pool.weights if w is not None]
        assert_added(lora.add_lora_(y.clone(), x, weights, plan), y, x, weights, plan)
    assert pool.workspace.max_rank == 256
