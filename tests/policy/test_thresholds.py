"""AIMD: every way in which a period can end, and beta <= alpha whatever happens."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from peft_dist.policy.settings import PolicySettings
from peft_dist.policy.thresholds import ThresholdTuner

RATIO = 15 / 27


def tuner(alpha: float = 1.0, beta: float | None = None, max_alpha: float = 2.0) -> ThresholdTuner:
    return ThresholdTuner(PolicySettings(alpha=alpha, beta=beta, max_alpha=max_alpha))


def after(subject: ThresholdTuner, *, merged: bool, merge_requests: int, switch: float = 0.02) -> tuple[float, float]:
    """Thresholds after ten steps in which merging would have served ``merge_requests`` and not merging 16."""
    for _ in range(10):
        subject.record(merge_requests, 16, 15e-3, 27e-3)
    subject.end_period(merged, switch, RATIO)
    return subject.alpha, subject.beta(RATIO)


def test_a_merged_period_that_paid_makes_merging_easier() -> None:
    assert after(tuner(), merged=True, merge_requests=16) == pytest.approx((0.95, RATIO))


def test_one_that_did_not_makes_it_harder() -> None:
    assert after(tuner(), merged=True, merge_requests=4) == pytest.approx((1.1, RATIO))


def test_up_to_a_limit() -> None:
    assert after(tuner(max_alpha=1.05), merged=True, merge_requests=4) == pytest.approx((1.05, RATIO))


def test_an_unmerged_period_that_paid_makes_leaving_easier() -> None:
    assert after(tuner(), merged=False, merge_requests=4) == pytest.approx((1.0, RATIO + 0.05))


def test_one_that_did_not_makes_staying_easier() -> None:
    assert after(tuner(), merged=False, merge_requests=16) == pytest.approx((1.0, RATIO / 1.1))


def test_a_step_that_would_cross_the_other_threshold_is_not_taken() -> None:
    assert after(tuner(0.6, 0.58), merged=True, merge_requests=16) == (0.6, 0.58)
    assert after(tuner(0.6, 0.58), merged=False, merge_requests=4) == (0.6, 0.58)


def test_the_switch_counts_against_the_mode_that_it_led_to() -> None:
    # 10 of 16 requests, merged, are 12 % more a second: too little for ten steps to pay for a switch.
    assert after(tuner(), merged=True, merge_requests=10)[0] == pytest.approx(1.1)
    assert after(tuner(), merged=True, merge_requests=10, switch=0.0)[0] == pytest.approx(0.95)
    assert after(tuner(), merged=False, merge_requests=8, switch=0.2)[1] == pytest.approx(RATIO / 1.1)
    assert after(tuner(), merged=False, merge_requests=8, switch=0.0)[1] == pytest.approx(RATIO + 0.05)


def test_virtual_switches_count_against_merging() -> None:
    subject = tuner()
    for _ in range(5):
        subject.virtual_switch(0.02)
    assert after(subject, merged=False, merge_requests=13) == pytest.approx((1.0, RATIO + 0.05))
    assert after(tuner(), merged=False, merge_requests=13) == pytest.approx((1.0, RATIO / 1.1))


def test_periods_do_not_run_into_each_other() -> None:
    subject = tuner()
    after(subject, merged=False, merge_requests=16)
    assert after(subject, merged=True, merge_requests=4)[0] == pytest.approx(1.1)


def test_nothing_is_learned_from_an_empty_period() -> None:
    subject = tuner()
    subject.end_period(True, 0.0, RATIO)
    subject.end_period(False, 0.0, RATIO)
    assert (subject.alpha, subject.beta(RATIO)) == pytest.approx((1.0, RATIO))


def test_until_a_period_has_ended_beta_follows_the_prediction() -> None:
    assert [tuner().beta(ratio) for ratio in (0.5, 0.9, 1.2)] == [0.5, 0.9, 1.0]


COUNT = st.integers(0, 300)


@given(
    st.floats(0.1, 3.0),
    st.sampled_from([1.0, 2.0, math.inf]),
    st.lists(st.tuples(st.booleans(), COUNT, COUNT, st.floats(0, 1), st.floats(1e-3, 1), st.floats(0.1, 2.0))),
)
def test_thresholds_stay_ordered(
    alpha: float, max_alpha: float, periods: list[tuple[bool, int, int, float, float, float]]
) -> None:
    subject = tuner(min(alpha, max_alpha), None, max_alpha)
    for merged, merge_requests, unmerge_requests, switch, seconds, ratio in periods:
        subject.record(merge_requests, unmerge_requests, seconds * ratio, seconds)
        subject.end_period(merged, switch, ratio)
        assert 0 < subject.beta(ratio) <= subject.alpha <= max_alpha
