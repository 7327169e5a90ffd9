"""Gamma arrivals: rates, spread, independence, and the artifact's own sequence."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.core.errors import ConfigError
from peft_dist.workload import arrivals
from peft_dist.workload.arrivals import Arrival, Workload, correlated_gamma_times, gamma_times, merged, uniform, zipf

# Standard errors that are let pass. The examples are the same every time, so that none fails by bad luck.
SIGMAS = 5.0
SEEDS = st.integers(0, 10**6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(rate=st.floats(0.05, 50), cv=st.floats(0.2, 4), seed=SEEDS)
def test_gaps_have_the_mean_and_cv_that_were_asked_for(rate: float, cv: float, seed: int) -> None:
    count = 4000
    gaps = np.diff(list(itertools.islice(gamma_times((seed,), rate, cv), count + 1))) * rate
    assert abs(gaps.mean() - 1) < SIGMAS * cv / math.sqrt(count)
    # Of the variance: for Gamma gaps the fourth central moment is 3 + 6 cv^2 times its square.
    error = math.sqrt((2 + 6 * cv**2) / count)
    assert abs(gaps.var() / cv**2 - 1) < SIGMAS * error


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cv=st.sampled_from([0.3, 1.0, 3.0]), seed=SEEDS, num=st.integers(1, 40))
def test_the_whole_has_the_rate_that_was_asked_for_however_bursty(cv: float, seed: int, num: int) -> None:
    rate, seconds = 20.0, 100.0
    drawn = merged(zipf(num, 1.0), rate, 6000, cv=cv, seed=seed)
    count = sum(time < seconds for time, _ in drawn)
    assert drawn[-1][0] > seconds
    # The number of a stationary renewal process varies by cv^2 of its mean, and by a constant of order cv^4 each.
    spread = math.sqrt(rate * seconds * cv**2 + num * (1 + cv**4))
    assert abs(count - rate * seconds) < SIGMAS * spread


@pytest.mark.parametrize("cv", [0.3, 3.0])
def test_the_rate_is_right_from_the_first_second(cv: float) -> None:
    """Processes that all begin with a whole gap, as the artifact's, give too many at first (or too few)."""

    def in_ten_seconds(seed: int, correlated: bool) -> int:
        drawn = merged(uniform(100), 20.0, 3000, cv=cv, seed=seed, correlated=correlated)
        return sum(time < 10 for time, _ in drawn)

    counts = np.array([in_ten_seconds(seed, False) for seed in range(30)])
    assert abs(counts.mean() - 200) < SIGMAS * counts.std() / math.sqrt(30)
    begun = np.array([in_ten_seconds(seed, True) for seed in range(30)])
    assert (begun.mean() - 200) * (cv - 1) > 20 * abs(cv - 1)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=SEEDS, exponent=st.floats(0, 2), num=st.integers(1, 20))
def test_requests_are_shared_as_asked(seed: int, exponent: float, num: int) -> None:
    shares, count = zipf(num, exponent), 3000
    found = np.bincount([index for _, index in merged(shares, 5.0, count, cv=1.0, seed=seed)], minlength=num)
    assert found.sum() == count
    assert np.all(np.abs(found - shares * count) < SIGMAS * np.sqrt(shares * (1 - shares) * count) + 1)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=SEEDS, num=st.integers(1, 8), stream=st.integers(0, 5))
def test_an_adapters_stream_depends_on_seed_interval_and_index_alone(seed: int, num: int, stream: int) -> None:
    def of_first(shares: list[float], rate: float) -> list[float]:
        drawn = merged(np.array(shares), rate, 50 * len(shares), cv=2.0, seed=seed, stream=stream)
        return [time for time, index in drawn if index == 0][:5]

    alone, among = of_first([1.0], 3.0), of_first([1.0] * (num + 1), 3.0 * (num + 1))
    length = min(len(alone), len(among))
    assert alone[:length] == among[:length]
    other = merged(np.array([1.0]), 3.0, 5, cv=2.0, seed=seed, stream=stream + 1)
    assert [time for time, _ in other] != alone


def test_streams_are_independent_and_the_artifacts_are_not() -> None:
    def gaps(index: int) -> np.ndarray:
        times = [time for time, found in drawn if found == index]
        return np.diff(times)[:1000]

    drawn = merged(uniform(2), 2.0, 4000, cv=1.0, seed=0)
    assert abs(np.corrcoef(gaps(0), gaps(1))[0, 1]) < SIGMAS / math.sqrt(1000)
    drawn = merged(np.array([1.0, 0.5]), 1.5, 4000, cv=1.0, seed=0, correlated=True)
    assert np.allclose(gaps(1), 2 * gaps(0))


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.25])
def test_the_artifacts_own_times(rate: float) -> None:
    times = list(itertools.islice(correlated_gamma_times(0, rate, 1.0), 3))
    assert np.round(np.array(times) * rate, 4).tolist() == [0.7959, 2.0518, 2.975]


def test_zipf_and_uniform() -> None:
    assert np.allclose(zipf(3, 1.0), np.array([6, 3, 2]) / 11)
    assert uniform(4).tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: zipf(0, 1), "at least one"),
        (lambda: zipf(2, -1), "exponent"),
        (lambda: merged(uniform(2), 0, 1, cv=1, seed=0), "rate"),
        (lambda: merged(uniform(2), math.inf, 1, cv=1, seed=0), "rate"),
        (lambda: merged(uniform(2), 1, 1, cv=0, seed=0), "cv"),
        (lambda: merged(uniform(2), 1, 1, cv=1, seed=-1), "seed"),
        (lambda: merged(np.zeros(2), 1, 1, cv=1, seed=0), "not all 0"),
        (lambda: Arrival(math.nan, "a", 1, 1), "seconds"),
        (lambda: Arrival(0.0, "a", 0, 1), "at least 1"),
        (lambda: Workload((Arrival(2.0, "a", 1, 1), Arrival(1.0, "a", 1, 1))), "sort by time"),
    ],
)
def test_what_cannot_be_is_refused(call: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()  # type: ignore[operator]


def test_an_adapter_without_a_share_gets_nothing() -> None:
    drawn = arrivals.merged(np.array([0.0, 1.0]), 1.0, 20, cv=1.0, seed=0)
    assert {index for _, index in drawn} == {1}
