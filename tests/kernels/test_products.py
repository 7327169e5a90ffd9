"""Ways of products are tried, and the fastest is what a pass of this size is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from peft_dist.kernels import product_bench
from peft_dist.kernels.few_rows import FewRows
from peft_dist.kernels.lora_parts_beside import PartsBeside
from peft_dist.kernels.product_bench import slots_of
from peft_dist.kernels.product_plans import ProductKey, ProductPlan, ProductPlans
from peft_dist.kernels.products import Products
from peft_dist.kernels.types import LoRALayerWeights, LoRAPlan
from tests import triton_interpreter
from tests.kernels.lora_cases import DEVICES, layers_of, random_rows
from tests.kernels.test_few_rows import small
from tests.kernels.test_lora_fused import plan_of
from tests.thorough import some_of

pytest.importorskip("triton")
pytestmark = pytest.mark.parametrize("device", DEVICES)
IN, OUTS, RANKS = 64, [32, 32], [[16, 16, 16, 16]] * 2
SPARED = (0, 8, 16, 24)
ROWS = np.array([0, 1, -1, 2, 3], np.int32)


@pytest.fixture(autouse=True)
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_bench, "LAYERS", 1)
    monkeypatch.setattr(product_bench, "_COLD_BYTES", 1 << 13)


class Clock:
    """Runs what it times, and says what it was told: the i-th takes ``times[i]``, others a second."""

    def __init__(self, times: dict[int, float]) -> None:
        self.times, self.count = times, 0

    def __call__(self, run: Callable[[], None]) -> float:
        run()
        self.count += 1
        return self.times.get(self.count - 1, 1000.0)


class Case:
    """Two layers with adapters, and products that are timed by a clock like this."""

    def __init__(self, device: str, times: dict[int, float], *, few: bool = True, beside: bool = True) -> None:
        triton_interpreter.mend()
        self.layers: list[LoRALayerWeights] = layers_of(device, RANKS, IN, OUTS, torch.float16, seed=1)
        self.plan: LoRAPlan = plan_of(device, ROWS, self.layers)
        self.plan.fuses = True
        self.x = random_rows(device, 1, len(ROWS), IN, dtype=torch.float16)
        self.clock, self.plans = Clock(times), ProductPlans()
        few_rows = FewRows(device, small) if few else None
        self.products = Products(self.plans, few_rows, PartsBeside(device) if beside else None, self.clock, SPARED)

    def alone(self, **options: Any) -> ProductPlan | None:
        with torch.inference_mode():
            return self.products.alone(self.x, OUTS, **options)

    def adapted(self, **options: Any) -> ProductPlan | None:
        with torch.inference_mode():
            return self.products.adapted(self.x, self.layers, self.plan, **options)


def test_a_product_alone(device: str) -> None:
    tried = len(SPARED)
    case = Case(device, {0: 10.0, 3: 8.0, tried: 9.0, tried + 1: 9.5, tried + 2: 9.0, tried + 3: 8.0})
    assert case.alone(few=True) is None and case.clock.count == 0
    with case.products.measuring():
        # The best of a library, and that against our kernel.
        assert case.alone(few=True) == ("library", SPARED[3]) and case.clock.count == tried + 2
        assert case.alone(few=False) == case.alone(few=True) == ("library", SPARED[3])
        assert case.alone(few=True, activation="silu") == ("kernel", 0)
        assert case.clock.count == tried + 4
    assert case.alone(few=True) == ("library", SPARED[3])


def test_a_size_beside_a_known_one_is_not_measured(device: str) -> None:
    case = Case(device, {0: 10.0, 2: 8.0})
    rows = {n: random_rows(device, n, IN, dtype=torch.float16) for n in (7, 12, 16, 24, 33)}
    with case.products.measuring(), torch.inference_mode():
        for n in (16, 24):
            assert case.products.alone(rows[n], OUTS, few=False) is not None
        assert case.clock.count == 2 * len(SPARED)
        assert case.products.alone(rows[12], OUTS, few=False) == ("library", SPARED[2])
        assert case.clock.count == 2 * len(SPARED)
        for n in (7, 33):
            assert case.products.alone(rows[n], OUTS, few=False) is not None
        assert case.clock.count == 4 * len(SPARED)


def test_a_guess_is_made_for_sizes_beside_measured_ones_too(device: str) -> None:
    case = Case(device, {})
    key = ProductKey(16, IN, tuple(OUTS), "float16", gated=False, few=False, slots=400, max_rank=64)
    with case.plans.measuring():
        case.plans.find(key, lambda: ProductPlan("beside", 40))
    case.plan = plan_of(device, np.zeros(12, np.int32), case.layers)
    case.x = random_rows(device, 12, IN, dtype=torch.float16)
    assert case.adapted(few=False) == ("beside", 40) and case.clock.count == 0


def test_a_way_that_computes_nothing_is_not_the_fastest(device: str) -> None:
    """As that of a kernel for half precision, asked for float32."""

    class Refusing(FewRows):
        def add_lora(self, *args: Any) -> None:
            return None

    case = Case(device, {})
    case.products = Products(case.plans, Refusing(device, small), None, case.clock, SPARED)
    with case.products.measuring():
        assert case.adapted(few=True) == ("behind", 0)
    assert case.clock.count == len(SPARED) + 2


def test_what_is_as_good_within_the_noise_is_planned_as_ever(device: str) -> None:
    case = Case(device, {0: 10.0, 3: 9.9})
    with case.products.measuring():
        assert case.alone(few=False) == ("library", 0)


@pytest.mark.parametrize("activation", some_of([None, "silu"]))
@pytest.mark.parametrize(("best", "wanted"), [(0, "behind"), (3, "beside"), (len(SPARED) + 1, "inside")])
def test_with_adapters_batches_of_all_and_of_one_count(
    device: str, best: int, wanted: str, activation: str | None
) -> None:
    alone, ways = len(SPARED), len(SPARED) + 2
    # All but one are close with the first batch, where another is the best.
    times = {alone + i: 10.0 for i in range(ways)} | {alone + 2: 9.5, alone + 4: 20.0}
    # What is timed with the second one is each but that.
    close = [i for i in range(ways) if i != 4]
    times |= {alone + ways + close.index(best): 5.0}
    case = Case(device, times)
    with case.products.measuring():
        found = case.adapted(few=True, activation=activation)
    assert found == (wanted, SPARED[best - 1] if wanted == "beside" else 0)
    assert case.clock.count == alone + ways + len(close)
    assert case.adapted(few=True, activation=activation) == found


def test_many_rows_are_not_tried_with_few_multiprocessors(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_bench, "_MANY_ROWS", len(ROWS))
    monkeypatch.setattr(product_bench, "_FEW_SPARED", SPARED[1])
    case = Case(device, {})
    with case.products.measuring():
        case.alone(few=False)
    assert case.clock.count == 2


def test_ways_that_are_not_there_are_not_tried(device: str) -> None:
    case = Case(device, {}, few=False, beside=False)
    with case.products.measuring():
        assert case.adapted(few=True) == ("behind", 0)
    assert case.clock.count == len(SPARED) + 2


def test_steps_whose_adapters_may_not_be_inside_take_the_plan_of_others(device: str) -> None:
    ways = len(SPARED) + 2
    case = Case(device, {len(SPARED) + 2: 1.0, len(SPARED) + ways + 2: 1.0})
    with case.products.measuring():
        case.adapted(few=True)
    assert case.adapted(few=False) == ("beside", SPARED[1])


def test_layers_that_are_not_all_adapted_or_in_no_pool_have_no_plan(device: str) -> None:
    case = Case(device, {})
    with case.products.measuring(), torch.inference_mode():
        assert case.products.adapted(case.x, [case.layers[0], None], case.plan, few=False) is None
        others = layers_of(device, RANKS, IN, OUTS, torch.float16, seed=2)
        assert case.products.adapted(case.x, others, case.plan, few=False) is None
        case.layers = layers_of(device, [[8]] * 2, IN, OUTS, torch.float16, seed=2)
        for layer in case.layers:
            layer.A, layer.B = layer.A[:4], layer.B[:4]
        case.plan.layers = case.layers
        assert case.adapted(few=False) is None, "there is no room for an adapter"


def test_without_memory_to_measure_in_plans_are_the_usual_ones(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    case = Case(device, {})
    monkeypatch.setattr(product_bench.torch, "randn", full)
    with case.products.measuring():
        assert case.alone(few=False) is None
        monkeypatch.undo()
        assert case.alone(few=True) is None and case.clock.count == 0
    assert "no memory left to measure products in" in caplog.text
    with case.products.measuring():
        assert case.alone(few=False) == ("library", 0)


@pytest.mark.parametrize("other", [None, ProductPlan("behind")])
def test_adapters_of_many_ranks_are_not_inside_whatever_was_measured(device: str, other: ProductPlan | None) -> None:
    """Ways are measured with rank 16; there a product multiplies every tile for the highest rank of all."""
    case = Case(device, {})
    workspace = case.layers[0].workspace
    assert workspace is not None
    key = ProductKey(len(ROWS), IN, tuple(OUTS), "float16", False, True, slots_of(case.layers[0]), workspace.max_rank)
    with case.plans.measuring():
        case.plans.find(key, lambda: ProductPlan("inside"))
        if other is not None:
            case.plans.find(key._replace(few=False), lambda: other)
    workspace.admit(16)
    assert case.adapted(few=True) == ("inside", 0)
    workspace.admit(17)
    assert case.adapted(few=True) == (other or ("beside", 0))
