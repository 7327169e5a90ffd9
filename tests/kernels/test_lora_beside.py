"""A shrink on a stream of its own, beside the layers' products, in steps that are not captured."""

from __future__ import annotations

import pytest
import torch

from peft_dist.kernels import lora
from tests.kernels.lora_cases import assert_added, layers_of, plan_of_rows, popularity, random_rows

RANKS = [[16, 8, 0, 64, 3], [16, 8, 5, 0, 3], [16, 8, 5, 64, 128]]
OUTS = [4096, 1024, 1024]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["identical", "uniform", "zipf"])
@pytest.mark.parametrize("num_rows", [lora._MANY_ROWS, 8192])
def test_many_rows_have_their_adapters_parts(kind: str, num_rows: int) -> None:
    """Time after time, so that a shrink that nobody waited for would show."""
    layers = layers_of("cuda", RANKS, 4096, OUTS, torch.bfloat16, seed=num_rows)
    plan = plan_of_rows(popularity(kind, num_rows, 5))
    weight = random_rows("cuda", sum(OUTS), 4096, dtype=torch.bfloat16) / 64
    for turn in range(8):
        x = random_rows("cuda", num_rows, 4096, dtype=torch.bfloat16, seed=turn)
        begun = lora.begin_lora(x, layers, plan)
        assert begun is not None
        y = x @ weight.T
        before = y.clone()
        begun.finish_(y.split(OUTS, dim=1))
        for got, was, weights in zip(y.split(OUTS, dim=1), before.split(OUTS, dim=1), layers, strict=True):
            assert_added(got, was, x, weights, plan)


@pytest.mark.gpu
def test_few_rows_are_not_worth_a_second_stream() -> None:
    layers = layers_of("cuda", RANKS, 4096, OUTS, torch.bfloat16, seed=1)
    x = random_rows("cuda", lora._MANY_ROWS - 1, 4096, dtype=torch.bfloat16)
    assert lora.begin_lora(x, layers, plan_of_rows(popularity("uniform", len(x), 5))) is None
