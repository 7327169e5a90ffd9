"""Rates that forget."""

from __future__ import annotations

import random

import pytest

from peft_dist.core.errors import ConfigError
from peft_dist.placement.rates import ArrivalRates


def fed(rate: float, seconds: float, half_life: float = 100.0, seed: int = 0) -> ArrivalRates:
    rng, now, rates = random.Random(seed), 0.0, ArrivalRates(half_life)
    rates.start(0.0)
    while (now := now + rng.expovariate(rate)) < seconds:
        rates.arrived("a", now)
    return rates


@pytest.mark.parametrize("seconds", [30.0, 100.0, 1000.0])
def test_a_steady_rate_is_found_early_and_late(seconds: float) -> None:
    assert fed(20.0, seconds).rate("a", seconds) == pytest.approx(20.0, rel=0.15)


def test_the_past_counts_half_after_a_half_life() -> None:
    rates = fed(20.0, 1000.0)
    before = rates.rate("a", 1000.0)
    assert rates.rate("a", 1100.0) == pytest.approx(before / 2, rel=0.01)
    assert rates.rate("a", 3000.0) < 1e-4


def test_one_request_is_no_flood() -> None:
    rates = ArrivalRates()
    rates.arrived("a", 7.0)
    assert rates.rate("a", 7.0) <= 1.01
    assert rates.rates(["a", "b"], 7.0)["b"] == 0.0


def test_work_is_a_mean_that_forgets() -> None:
    rates = ArrivalRates(half_life=10.0, default_work=3.0)
    assert rates.work("a") == 3.0
    rates.finished("a", 1.0, 0.0)
    rates.finished("a", 4.0, 10.0)
    assert rates.work("a") == pytest.approx((0.5 * 1.0 + 4.0) / 1.5)
    rates.arrived("a", 10.0)
    rates.forget("a")
    assert rates.work("a") == 3.0 and rates.rate("a", 10.0) == 0.0


def test_a_half_life_is_needed() -> None:
    with pytest.raises(ConfigError, match="half_life=0 of arrival rates must be above 0"):
        ArrivalRates(0)
