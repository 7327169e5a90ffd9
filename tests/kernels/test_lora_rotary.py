"""The expand of q/k/v in the rotary embedding: in the interpreter on tiny shapes, and compiled on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from peft_dist.kernels import lora, lora_triton, reference, reference_glue
from peft_dist.kernels.lora_group import make_tiles
from peft_dist.kernels.lora_plans import GroupPlan
from peft_dist.kernels.lora_rotary_triton import lora_expand_rotary, takes_rotary
from peft_dist.kernels.lora_tiles import LoRATiles, max_tiles, write_tiles
from peft_dist.kernels.types import KVCache, LoRALayerWeights, LoRAPlan
from tests.kernels.lora_cases import DEVICES, layers_of, plan_of_rows, popularity, random_rows

pytestmark = pytest.mark.parametrize("device", DEVICES)
# Inputs, heads, heads of keys and values.
SIZES = {"cpu": (24, 3, 1), "cuda": (4096, 32, 8)}
BLOCK = 4


class Case:
    """Random q/k/v, columns of one tensor, and a cache that holds NaN; every third row is not to be written."""

    def __init__(
        self, device: str, ranks: Sequence[Sequence[int]], num_rows: int, dtype: torch.dtype, dim: int
    ) -> None:
        self.device, self.dim, self.dtype, self.num_rows = device, dim, dtype, num_rows
        inputs, heads, kv_heads = SIZES[device]
        self.outs = [heads * dim, kv_heads * dim, kv_heads * dim]
        self.weights = layers_of(device, ranks, inputs, self.outs, dtype, seed=3)
        self.x = random_rows(device, num_rows, inputs, dtype=dtype, seed=1)
        self.joint = random_rows(device, num_rows, sum(self.outs), dtype=dtype, seed=2)
        angles = torch.randn(num_rows, dim // 2, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
        self.places = torch.randperm(2 * num_rows, generator=torch.Generator().manual_seed(4))[:num_rows].to(device)
        self.places[2::3] = -1

    def cache(self, dtype: torch.dtype | None = None) -> KVCache:
        shape = 2, -(-2 * self.num_rows // BLOCK), BLOCK, self.outs[1] // self.dim, self.dim
        return KVCache(*torch.full(shape, float("nan"), dtype=dtype or self.dtype, device=self.device))

    def heads(self, joint: torch.Tensor) -> list[torch.Tensor]:
        return [y.view(len(joint), -1, self.dim) for y in joint.split(self.outs, dim=1)]

    def exact(
        self, weights: Sequence[LoRALayerWeights | None], plan: LoRAPlan, x: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, KVCache]:
        """By the plain twins, in float32."""
        joint, cache = self.joint.float().clone(), self.cache(torch.float32)
        for y, w in zip(joint.split(self.outs, dim=1), weights, strict=True):
            if w is not None:
                reference.add_lora_(y, (self.x if x is None else x).float(), w, plan)
        turned = reference_glue.rotary_and_write(
            *self.heads(joint), self.cos.float(), self.sin.float(), cache, self.places
        )
        return turned, cache

    def run(
        self, weights: Sequence[LoRALayerWeights | None], plan: LoRAPlan, launch: GroupPlan | None = None
    ) -> tuple[torch.Tensor, KVCache]:
        cache, before = self.cache(), self.joint.clone()
        lora_triton.lora_shrink_group(self.x, weights, plan, launch=launch)
        turned = lora_expand_rotary(
            *self.heads(self.joint), self.cos, self.sin, cache, self.places, weights, plan, launch=launch
        )
        assert torch.equal(self.joint, before) and turned.is_contiguous()
        return turned, cache

    def check(
        self, weights: Sequence[LoRALayerWeights | None], plan: LoRAPlan, launch: GroupPlan | None = None
    ) -> None:
        got, exact = self.run(weights, plan, launch), self.exact(weights, plan)
        pairs = (got[0], exact[0]), (got[1].key, exact[1].key), (got[1].value, exact[1].value)
        # Triton's interpreter cuts bfloat16 off where a GPU rounds.
        limit = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[self.dtype]
        for one, other in pairs:
            assert torch.equal(one.isnan(), other.isnan())
            assert (one.nan_to_num().float() - other.nan_to_num()).norm() <= limit * other.nan_to_num().norm()


def plan_of(slots: np.ndarray, device: str) -> LoRAPlan:
    plan = plan_of_rows(slots)
    plan.tiles = make_tiles(slots, torch.device(device), 16, has_base=True)._replace(with_adapter=None)
    return plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["identical", "distinct", "uniform"])
def test_popularities(device: str, kind: str, dtype: torch.dtype) -> None:
    num_rows = 13 if device == "cpu" else 133
    case = Case(device, [[8, 1, 16, 0, 20], [8, 4, 0, 3, 20], [0, 1, 17, 3, 8]], num_rows, dtype, 16)
    case.check(case.weights, plan_of(popularity(kind, num_rows, 5, seed=5), device))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 7, 19])
@pytest.mark.parametrize("dim", [12, 128])
def test_awkward_sizes(device: str, num_rows: int, dim: int) -> None:
    case = Case(device, [[8, 3], [4, 16], [2, 1]], num_rows, torch.float16, dim)
    plan = plan_of(popularity("skewed", num_rows, 2, seed=num_rows), device)
    case.check(case.weights, plan, GroupPlan(block_k=16, split=3, block_n=16, rotary_warps=1 + num_rows % 2))


@pytest.mark.parametrize(
    "adapted",
    [(1, 0, 1), (0, 1, 0), (0, 1, 1), (1, 1, 0), (0, 0, 1)],
    ids=lambda a: "".join("qkv"[i] * a[i] for i in range(3)),
)
def test_layers_that_nobody_adapts(device: str, adapted: tuple[int, int, int]) -> None:
    case = Case(device, [[8, 3], [4, 17], [2, 1]], 9, torch.float16, 16)
    weights = [w if there else None for w, there in zip(case.weights, adapted, strict=True)]
    case.check(weights, plan_of(popularity("uniform", 9, 2), device))


def test_unused_tiles_and_padded_rows(device: str) -> None:
    """As in a captured step: what is in no tile writes nothing; other entries of the tiles' arrays hold anything."""
    case = Case(device, [[8, 17], [8, 0], [3, 3]], 7, torch.float16, 16)
    slots = np.array([0, 1, 1, -1, 0], np.int32)
    room = max_tiles(7, 2, 16, has_base=True) + 2
    arrays = [np.full(size, 12345, np.int32) for size in (room * 16, room, room)]
    write_tiles(slots, *arrays, tile_rows=16, has_base=True)
    plan = plan_of_rows(np.concatenate([slots, [-1, -1]]).astype(np.int32))
    plan.tiles = LoRATiles(*(torch.from_numpy(a).to(device) for a in arrays), tile_rows=16, has_base=True)
    got, cache = case.run(case.weights, plan)
    exact, expected = case.exact(case.weights, plan)
    assert (got[:5].float() - exact[:5]).norm() <= 5e-4 * exact[:5].norm()
    for ours, theirs in zip(cache, expected, strict=True):
        flat, other = ours.flatten(0, 1), theirs.flatten(0, 1)
        other[case.places[5:][case.places[5:] >= 0]] = float("nan")
        assert torch.equal(flat.isnan(), other.isnan())
        assert (flat.nan_to_num().float() - other.nan_to_num()).norm() <= 5e-4 * other.nan_to_num().norm()


def test_a_row_gets_the_same_bits_beside_any_others(device: str) -> None:
    case = Case(device, [[5, 8, 17], [8, 0, 4], [8, 3, 2]], 12, torch.float16, 16)
    slots = popularity("uniform", 12, 3, seed=3)
    for chosen in (np.arange(12)[::-1].copy(), np.array([3]), np.flatnonzero(slots == slots[0])):
        part = Case(device, [[5, 8, 17], [8, 0, 4], [8, 3, 2]], 12, torch.float16, 16)
        index = torch.from_numpy(chosen).to(device)
        for name in ("x", "joint", "cos", "sin", "places"):
            setattr(part, name, getattr(case, name)[index].contiguous())
        # One launch plan for both: that of all rows.
        launch = GroupPlan(block_k=16, split=2, block_n=16)
        together, cache = case.run(case.weights, plan_of(slots, device), launch)
        alone, other = part.run(case.weights, plan_of(slots[chosen], device), launch)
        assert torch.equal(alone, together[index])
        for place in part.places[part.places >= 0].tolist():
            for ours, theirs in zip(cache, other, strict=True):
                assert torch.equal(ours.flatten(0, 1)[place], theirs.flatten(0, 1)[place])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_broken_adapter_and_broken_rows_reach_no_other(device: str) -> None:
    case = Case(device, [[2, 3, 4]] * 3, 6, torch.float16, 16)
    plan = plan_of(np.array([0, 1, 1, 2, -1, 2], np.int32), device)
    expected, before = case.run(case.weights, plan)
    case.weights[0].B[int(case.weights[0].rows_of(1)[0])] = float("inf")
    case.weights[2].B[int(case.weights[2].rows_of(1)[0])] = float("inf")
    case.x[5] = float("nan")
    got, cache = case.run(case.weights, plan)
    assert not torch.isfinite(got[[1, 2, 5]]).any()
    assert torch.equal(got[[0, 3, 4]], expected[[0, 3, 4]])
    for row in (0, 3, 4):
        if (place := int(case.places[row])) >= 0:
            assert torch.equal(cache.value.flatten(0, 1)[place], before.value.flatten(0, 1)[place])


def test_where_it_is_not_taken(device: str) -> None:
    case = Case(device, [[8], [8], [8]], 4, torch.float16, 16)
    slots = np.zeros(4, np.int32)
    plan, cache = plan_of(slots, device), case.cache()
    assert lora.has_rotary(case.x, case.weights, plan, cache, 16)
    assert lora.has_rotary(case.x, [None, case.weights[1], None], plan, cache, 16)
    assert not lora.has_rotary(case.x, [None] * 3, plan, cache, 16)
    assert not lora.has_rotary(case.x, case.weights, plan, cache, 8), "a part of the head turns"
    assert not lora.has_rotary(case.x, case.weights, plan, case.cache(torch.float32), 16)
    assert not lora.has_rotary(case.x, case.weights, plan, KVCache(cache.key, cache.value[..., :8]), 16)
    tiles = plan.tiles
    assert tiles is not None
    for change in ({"has_base": False}, {"tile_rows": 32}, {"with_adapter": 1}):
        plan.tiles = tiles._replace(**change)
        assert not takes_rotary(case.x, case.weights, plan, cache, 16)
    plan.tiles = tiles
    many = plan_of(np.zeros(257, np.int32), device)
    assert not takes_rotary(case.x, case.weights, many, cache, 16)
    plan.backend = "torch"
    assert not lora.has_rotary(case.x, case.weights, plan, cache, 16)


def test_what_does_not_fit_is_refused(device: str) -> None:
    case = Case(device, [[8], [8], [8]], 4, torch.float16, 16)
    plan, cache = plan_of(np.zeros(4, np.int32), device), case.cache()
    heads = case.heads(case.joint)
    with pytest.raises(ValueError, match="do not fit their outputs"):
        lora_expand_rotary(
            heads[0][:, :1], *heads[1:], case.cos, case.sin, cache, case.places, case.weights, plan
        )  # fmt: skip
    with pytest.raises(ValueError, match="turn by"):
        lora_expand_rotary(*heads, case.cos[:, :8], case.sin, cache, case.places, case.weights, plan)
    plan.tiles = make_tiles(np.zeros(4, np.int32), torch.device(device), 16)
    with pytest.raises(ValueError, match="has_base"):
        lora_expand_rotary(*heads, case.cos, case.sin, cache, case.places, case.weights, plan)
