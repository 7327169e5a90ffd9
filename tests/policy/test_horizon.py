"""How long requests and leads last, as observed."""

from __future__ import annotations

import pytest

from peft_dist.policy.horizon import LeadSteps, RequestSteps, RunningMean


def test_few_observations_are_averaged_and_many_forget() -> None:
    mean = RunningMean()
    for value in (2.0, 4.0, 9.0):
        mean.add(value)
    assert mean.value == pytest.approx(5.0)
    for _ in range(200):
        mean.add(1.0)
    assert mean.value == pytest.approx(1.0, abs=0.01)


def test_requests_end_and_correct_what_was_assumed() -> None:
    steps = RequestSteps(64.0)
    for i in range(6):
        steps.ran([f"r{i}", "other"])
        steps.ran([f"r{i}"])
        steps.ended([f"r{i}", "unknown"])
    assert steps.mean == pytest.approx((4 * 64 + 6 * 2) / 10)


def test_what_has_run_already_is_not_expected_again() -> None:
    steps = RequestSteps(10.0)
    for _ in range(4):
        steps.ran(["old"])
    for _ in range(20):
        steps.ran(["older"])
    assert steps.left(["old"]) == 6.0
    assert steps.left(["older"]) == 1.0, "it has not ended yet"
    assert steps.left(["old", "new"]) == 8.0
    assert steps.left([]) == 10.0


class TestLeads:
    def test_what_is_assumed_holds_until_some_have_ended(self) -> None:
        leads = LeadSteps(7.0)
        for leader in "aabbaabb":
            leads.ran(leader)
        assert leads.mean == 7.0, "the fourth lead has not ended"
        leads.ran(None)
        assert leads.mean == 2.0

    def test_a_lead_that_lasts_longer_is_expected_to_go_on(self) -> None:
        leads = LeadSteps(0.0)
        for leader in "abababa" + "a" * 9:
            leads.ran(leader)
        assert leads.expected("b") == leads.mean == 1.0
        assert leads.expected("a") == 10.0

    def test_steps_without_a_leader_are_no_lead(self) -> None:
        leads = LeadSteps(0.0)
        for leader in [*"abab", *[None] * 50, "a", None]:
            leads.ran(leader)
        assert leads.mean == 1.0

    def test_a_step_at_least_is_to_come(self) -> None:
        assert LeadSteps(0.0).expected("a") == 1.0
