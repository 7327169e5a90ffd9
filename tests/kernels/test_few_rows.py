"""Which products of few rows our kernel takes, and that they are what the usual way computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from peft_dist.kernels import reference
from peft_dist.kernels.few_rows import FewRows
from peft_dist.kernels.lora_fused_plans import (
    MOST_ADDED_ROWS,
    MOST_MULTIPLIED_ROWS,
    FusedPlan,
    choose_plan,
    chooser_for,
)
from tests import triton_interpreter
from tests.kernels.lora_cases import DEVICES, LIMIT, layers_of, random_rows
from tests.kernels.test_lora_fused import IN, RANKS, SMALL, error, expected, plan_of

LLAMA = {"qkv": (4096, [4096, 1024, 1024]), "o": (4096, [4096]), "gate": (4096, [14336] * 2), "down": (14336, [4096])}
SLOTS = np.array([0, 1, 1, -1, 3, 2, 0, 4, 9, 3], np.int32)


@pytest.mark.parametrize("rows", [1, 16, 17, 32])
@pytest.mark.parametrize("layers", LLAMA.values(), ids=LLAMA.keys())
def test_plans_fit_what_they_are_for(layers: tuple[int, list[int]], rows: int) -> None:
    inputs, outs = layers
    plan = choose_plan(rows, inputs, outs, gated=False, has_adapters=True)
    assert plan is not None
    assert all(out % plan.block_n == 0 for out in outs) and inputs % (plan.split * plan.block_k) == 0
    # All programs of the product run at once.
    assert sum(outs) // plan.block_n * plan.split <= 4 * 132


def test_what_was_not_measured_or_is_slower_is_left_to_others() -> None:
    def choose(rows: int, inputs: int, *outs: int, gated: bool = False, has_adapters: bool = True) -> FusedPlan | None:
        return choose_plan(rows, inputs, outs, gated=gated, has_adapters=has_adapters)

    for has_adapters, most in ((True, MOST_ADDED_ROWS), (False, MOST_MULTIPLIED_ROWS)):
        assert choose(most, 4096, 4096, has_adapters=has_adapters) is not None
        assert choose(most + 1, 4096, 4096, has_adapters=has_adapters) is None
    assert choose(0, 4096, 4096) is None
    assert choose(8, 4096, 128256) is None and choose(8, 2048, 2048) is None
    assert choose(8, 4096, 4096, 1000, 1048) is None and choose(8, 4000, 4096) is None
    assert choose(8, 4096, 4096, 1024, 1024, has_adapters=False) is None
    assert choose(8, 4096, 4096, has_adapters=False) is not None
    assert choose(32, 4096, 14336, 14336, gated=True, has_adapters=False) is not None
    assert choose(16, 4096, 14336, 14336, gated=True) is not None
    assert choose(32, 4096, 14336, 14336, gated=True) is None and choose(32, 4096, 14336, 14336) is not None


def test_cards_differ_in_what_they_multiply_faster() -> None:
    for card, most in (("NVIDIA H200", MOST_MULTIPLIED_ROWS), ("NVIDIA H100 80GB HBM3", 32)):
        choose = chooser_for(card)
        for has_adapters, bound in ((True, MOST_ADDED_ROWS), (False, most)):
            plans = [choose(n, 4096, [4096], gated=False, has_adapters=has_adapters) for n in (bound, bound + 1)]
            assert plans[0] is not None and plans[1] is None


def small(*args: Any, gated: bool, has_adapters: bool) -> FusedPlan | None:
    return SMALL


def small_apart(*args: Any, gated: bool, has_adapters: bool) -> FusedPlan | None:
    """The activation behind the product."""
    return None if gated else SMALL


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("choose", [small, small_apart])
def test_a_gated_mlps_layers(device: str, choose: Any) -> None:
    triton_interpreter.mend()
    layers = layers_of(device, RANKS[:2], IN, [32, 32], torch.float16, seed=1)
    plan = plan_of(device, SLOTS, layers)
    plan.fuses = True
    x, weight = (random_rows(device, n, IN, dtype=torch.float16) for n in (len(SLOTS), 64))
    weight /= 8
    found = FewRows(device, choose).add_lora(x[None], weight, layers, plan, "silu")
    assert found is not None and found.shape == (1, len(SLOTS), 32)
    wanted = reference.lora_gate(*(x.float() @ weight.float().T).split(32, dim=1), x.float(), layers, plan)
    # Apart, the product is rounded before the activation.
    assert error(found[0], wanted) < 2 * error(wanted.half(), wanted) + LIMIT[x.dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_calls_that_are_left_to_others(device: str) -> None:
    triton_interpreter.mend()
    layers = layers_of(device, RANKS[:2], IN, [32, 32], torch.float16, seed=1)
    x, weight = (random_rows(device, n, IN, dtype=torch.float16) for n in (len(SLOTS), 64))
    few = FewRows(device, small)

    def add(weights: list[Any] = layers, x: torch.Tensor = x, weight: torch.Tensor = weight, **fields: Any) -> Any:  # type: ignore[assignment]
        plan = plan_of(device, SLOTS, layers)
        plan.fuses = True
        for name, value in fields.items():
            setattr(plan, name, value)
        return few.add_lora(x, weight, weights, plan)

    found = add()
    wanted = expected(x, weight, layers, plan_of(device, SLOTS, layers))
    assert found is not None and error(found, wanted) < error(wanted.half(), wanted) + LIMIT[x.dtype]
    assert add(fuses=False) is None and add(backend="torch") is None and add(layers=[]) is None
    assert add([layers[0], None]) is None and add(tiles=None) is None
    assert add(x=x.float()) is None and add(weight=weight.float()) is None and add(weight=weight[:48]) is None
    assert add(weight=random_rows(device, IN, 64, dtype=torch.float16).T) is None
    plan = plan_of(device, SLOTS, layers)
    plan.fuses = True
    assert few.add_lora(x, weight, layers, plan) is not None
    # In a pass each layer has one counter.
    assert few.add_lora(x, weight, layers, plan) is None
    assert few.multiply(x.float(), weight.float()) is None and few.multiply(x, weight[:40]) is None
    alone = few.multiply(x, weight)
    base = x.float() @ weight.float().T
    assert alone is not None and error(alone, base) < error(base.half(), base) + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["o", "gate", "down"])
def test_products_of_more_rows(name: str) -> None:
    inputs, outs = LLAMA[name]
    x = random_rows("cuda", MOST_MULTIPLIED_ROWS, inputs, dtype=torch.bfloat16)
    weight = torch.randn(sum(outs), inputs, device="cuda", dtype=torch.bfloat16) / inputs**0.5
    found = FewRows("cuda").multiply(x, weight, "silu" if name == "gate" else None)
    wanted = x.float() @ weight.float().T
    if name == "gate":
        gate, up = wanted.split(outs, dim=1)
        wanted = torch.nn.functional.silu(gate) * up
    assert found is not None and error(found, wanted) < error(wanted.bfloat16(), wanted) + LIMIT[x.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 16, 32])
@pytest.mark.parametrize("name", LLAMA)
def test_real_layers_in_a_graph(name: str, rows: int) -> None:
    """A captured launch, whose adapters, slots and tables change before it is replayed."""
    inputs, outs = LLAMA[name]
    ranks = [[16, 8, 0, 64, 3], [16, 16, 8, 0, 33], [1, 16, 64, 8, 8]][: len(outs)]
    layers = layers_of("cuda", ranks, inputs, outs, torch.bfloat16, seed=1)
    x = random_rows("cuda", rows, inputs, dtype=torch.bfloat16)
    weight = torch.randn(sum(outs), inputs, device="cuda", dtype=torch.bfloat16) / inputs**0.5
    few = FewRows("cuda")
    activation: Any = "silu" if name == "gate" else None
    rng = np.random.default_rng(rows)
    first = plan_of("cuda", rng.integers(-1, 5, rows).astype(np.int32), layers)

    def run() -> list[torch.Tensor | None]:
        plan = replace(first, scratch={}, fuses=True)
        return [few.add_lora(x, weight, layers, plan, activation), few.multiply(x, weight, activation)]

    run()
    graph, outputs = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        outputs[:] = run()
    assert outputs[0] is not None and (outputs[1] is not None) == (name != "qkv")
    for kind in ("one", "mixed", "distinct"):
        slots = {"one": np.ones(rows), "mixed": rng.integers(-1, 5, rows), "distinct": np.arange(rows) % 5}[kind]
        plan = plan_of("cuda", slots.astype(np.int32), layers)
        assert plan.tiles is not None and first.tiles is not None
        for to, source in zip(first.tiles[:3], plan.tiles[:3], strict=True):
            to.copy_(source)
        x.copy_(random_rows("cuda", rows, inputs, dtype=torch.bfloat16, seed=len(kind)))
        for output in outputs:
            if output is not None:
                output.fill_(float("nan"))
        graph.replay()
        wanted = [expected(x, weight, layers, plan), x.float() @ weight.float().T]
        if activation:
            wanted = [reference.lora_gate(*y.split(outs, dim=1), x.float(), [None] * 2, plan) for y in wanted]
        for output, exact in zip(outputs, wanted, strict=True):
            if output is not None:
                # Where the activation is apart, the product is rounded before it.
                assert error(output, exact) < 2 * error(exact.bfloat16(), exact) + LIMIT[x.dtype], kind
    used = [few._workspace, layers[0].workspace]
    assert not any(workspace.take_counters(1).any() for workspace in used if workspace is not None)
