"""Who pays, what is counted for the thresholds, and what an interruption costs, branch by branch."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import pytest

from peft_dist.core.cost_model import CostModel, CostPrior
from peft_dist.policy.batching import QueueState
from peft_dist.policy.credit import CreditPolicy
from peft_dist.policy.settings import PolicySettings
from peft_dist.policy.settlement import interruption_price
from peft_dist.policy.thresholds import ThresholdTuner
from tests.policy.queues import ids, queue, step

PAPER = CostModel.paper()
MERGED, UNMERGED, SWITCH = 15e-3, 27e-3, 20e-3


def credit(settings: PolicySettings | None = None, cost: CostModel = PAPER) -> CreditPolicy:
    """One that believes every lead to last, until it has seen some end."""
    return CreditPolicy(cost, replace(settings or PolicySettings(), expected_lead=math.inf))


def ranked(state: QueueState, **ranks: int) -> QueueState:
    candidates = [msgspec.structs.replace(c, rank=ranks[c.adapter]) for c in state.candidates]
    return msgspec.structs.replace(state, candidates=candidates)


# Merged on a, which stays, though b has more requests.
OUTNUMBERED = queue("aaabbbb", merged="a", seats=4)


class Periods(ThresholdTuner):
    """Remembers how periods ended: whether merged, and the seconds of the switch."""

    def __init__(self) -> None:
        super().__init__(PolicySettings())
        self.ended: list[tuple[bool, float]] = []

    def end_period(self, merged: bool, switch_seconds: float, speed_ratio: float) -> None:
        self.ended.append((merged, switch_seconds))
        super().end_period(merged, switch_seconds, speed_ratio)


BASE_QUEUE = queue("a" + 16 * "-")


class TestCounting:
    def staying(self) -> CreditPolicy:
        policy = credit()
        assert step(policy, queue("aaaa")).merged_adapter == "a"
        assert step(policy, OUTNUMBERED).reason == "stay"
        return policy

    def test_while_merged_the_merged_adapters_requests_count_and_not_the_leaders(self) -> None:
        assert self.staying().tuner.period.merge_requests == 4 + 3

    def test_while_merged_a_new_leader_is_no_switch(self) -> None:
        assert self.staying().tuner.period.merge_seconds == pytest.approx(2 * MERGED)

    def test_an_alone_base_batch_counts_its_own_requests_too(self) -> None:
        policy = credit()
        assert step(policy, queue("a" + 16 * "-")).reason == "enter"
        assert step(policy, queue("---bbbb", seats=4)).reason == "stay"
        assert policy.tuner.period.merge_requests == 16 + 3

    def test_a_period_with_a_corrected_batch_begins_with_it(self) -> None:
        prior = CostPrior(step=10e-3, decode_sequence=1e-3, lora_step=0.0, lora_token=2e-3, adapter=0.0)
        policy = credit(PolicySettings(merged_minority=True), CostModel(prior, fixed=True))
        assert step(policy, queue("ab", mergeable=lambda adapter: False)).reason == "first come"
        assert step(policy, queue("aaaaab-aaaaaa")).reason == "corrected"
        assert policy.tuner.period.unmerge_requests == 13

    def test_a_period_of_the_base_lasts_also_where_others_might_join(self) -> None:
        policy = credit(PolicySettings(merged_minority=True))
        assert step(policy, queue("a" + 16 * "-")).reason == "enter"
        assert step(policy, queue("a--")).reason == "stay"

    def test_periods_of_the_base_begin_and_end_without_a_switch(self) -> None:
        policy = credit()
        policy.tuner = periods = Periods()
        for state in (queue("ab"), BASE_QUEUE, queue("ab")):
            step(policy, state)
        assert periods.ended == [(False, 0.0), (True, 0.0)]

    def test_those_of_an_adapter_with_one(self) -> None:
        policy = credit()
        policy.tuner = periods = Periods()
        for state in (queue("ab"), queue("aaaa"), queue("ab" + 20 * "-", merged="a")):
            step(policy, state)
        assert periods.ended == [(False, SWITCH), (True, SWITCH)]

    def test_no_more_than_the_seats_count(self) -> None:
        policy = credit()
        step(policy, queue("aaaa", seats=2))
        assert policy.tuner.period.merge_requests == 2

    def test_nothing_where_nobody_can_be_merged(self) -> None:
        policy = credit()
        step(policy, queue("ab", mergeable=lambda adapter: False))
        assert (policy.tuner.period.merge_requests, policy.tuner.period.unmerge_requests) == (0, 2)

    def test_while_unmerged_the_base_as_leader_is_no_switch(self) -> None:
        policy = credit()
        assert step(policy, queue("a--b")).reason == "first come"
        assert policy.tuner.period.merge_seconds == pytest.approx(MERGED)


class TestPaying:
    def test_a_first_come_batch_of_which_only_some_ran_costs_nobody_anything(self) -> None:
        policy = credit()
        step(policy, queue("abc"), scheduled=["a0"])
        assert policy.credits == {"a": 0.0, "b": 0.0, "c": 0.0}

    def test_privilege_that_was_not_used_does_not_last_down_to_half_of_the_gap(self) -> None:
        policy = credit()
        policy.ledger.move("x", "b", 1.0)
        assert step(policy, queue("acb")).reason == "first come", "b runs anyway"
        policy.ledger.move("b", "x", 1.0 - 0.07)
        assert 0.5 * policy.ledger.gap < policy.ledger.credit("b") < policy.ledger.gap
        assert step(policy, queue("acacacb", seats=4)).reason == "first come"

    def test_more_privileged_than_seats_change_nothing_if_they_have_all_seats(self) -> None:
        policy = credit()
        policy.ledger.move("x", "b", 1.0)
        choice = step(policy, queue("bbbbb", seats=4))
        assert (choice.reason, ids(choice)) == ("enter", ["b0", "b1", "b2", "b3"])

    def test_the_privileged_pay_for_whom_they_slow_down(self) -> None:
        policy = credit()
        step(policy, queue("aaaa"))
        policy.ledger.move("a", "b", 0.11)
        assert step(policy, queue("aaaaaaaaab", merged="a")).reason == "privileged"
        assert policy.credits["b"] == pytest.approx(0.11 - UNMERGED * interruption_price(0.9, MERGED / UNMERGED))

    def test_those_chosen_who_did_not_run_pay_nothing(self) -> None:
        policy = credit()
        step(policy, queue("aaaa"))
        policy.ledger.move("a", "b", 0.13)
        assert step(policy, queue("aaabb", merged="a", seats=4), scheduled=["a0"]).reason == "privileged"
        assert policy.credits["b"] == 0.13

    def test_nobody_is_displaced_where_unmerged_nobody_could_run(self) -> None:
        policy = credit()
        assert step(policy, queue("aaa", loras=0, merged="a")).reason == "stay"
        assert policy.credits == {"a": 0.0}


class TestPrices:
    def test_the_gap_is_that_of_interrupting_the_adapter_that_is_merged_and_not_the_leader(self) -> None:
        prior = CostPrior(15e-3, 0.0, 0.0, lora_step=12e-3, lora_token=0.0, adapter=0.0, merge=(0.0, 1e-3))
        policy = credit(cost=CostModel(prior, fixed=True))
        step(policy, ranked(queue("aaaa"), a=8))
        assert step(policy, ranked(OUTNUMBERED, a=8, b=64)).reason == "stay"
        assert policy.report()["credit_gap"] == pytest.approx(1.5 * (SWITCH + UNMERGED + 8e-3) * 7 / 4)

    def test_who_does_not_amortise_stays_merged_at_a_loss(self) -> None:
        prior = CostPrior(merged_step=1e-2, lora_step=0.0, lora_token=0.0, adapter=0.0)
        policy = credit(PolicySettings(amortise=False), CostModel(prior, fixed=True))
        assert step(policy, queue("aaa", merged="a")).reason == "stay"

    def test_before_the_first_choice_neither_mode_is_the_faster_one(self) -> None:
        assert credit().report()["speed_ratio"] == 1.0

    def test_entering_a_period_of_the_base_costs_the_unmerge_if_any(self) -> None:
        # 12 ms a step are saved.
        merged = msgspec.structs.replace(BASE_QUEUE, merged_adapter="a")
        assert step(credit(PolicySettings(expected_steps=1.0)), BASE_QUEUE).reason == "enter"
        assert step(credit(PolicySettings(expected_steps=1.0)), merged).reason == "first come"
        assert step(credit(PolicySettings(expected_steps=2.0)), merged).reason == "enter"

    def test_leaving_one_costs_nothing(self) -> None:
        prior = CostPrior(merged_token=1e-3, lora_step=5e-3, lora_token=0.0, adapter=0.0, unmerge=(1e6, 0.0))
        policy = credit(PolicySettings(credit_gap=1e9), CostModel(prior, fixed=True))
        assert step(policy, queue("a--", seats=2)).reason == "enter"
        reasons = [step(policy, queue("a--", seats=2, prompts={1: 30})).reason for _ in range(10)]
        assert reasons[0] == "stay" and "first come" in reasons

    def test_who_loses_nothing_by_staying_stays_though_unmerging_is_free(self) -> None:
        prior = CostPrior(lora_step=0.0, lora_token=0.0, adapter=0.0, unmerge=(0.0, 0.0))
        assert step(credit(cost=CostModel(prior, fixed=True)), queue("aaa", merged="a")).reason == "stay"


def test_a_request_that_ended_is_overtaken_no_longer() -> None:
    policy = credit()
    step(policy, queue("aaaa"))
    for now in (0.0, 1.0):
        step(policy, queue("baaa", merged="a", now=now))
    assert policy.overtaking.longest == 1.0
    policy.forget(["b0"])
    assert policy.overtaking.longest == 0.0


class TestLeads:
    """Steps on end in which an adapter has enough requests for merging to pay: r = 15 / 27 of the first-come batch."""

    def leads(self, *states: QueueState, policy: CreditPolicy | None = None) -> list[str | None]:
        """Whose lead each step counts for."""
        policy, seen = policy or credit(), []
        ran = policy.leads.ran
        policy.leads.ran = lambda leader: (seen.append(leader), ran(leader))  # type: ignore[method-assign, func-returns-value]
        for state in states:
            step(policy, state)
        return seen

    def test_of_the_adapter_with_enough_requests_merged_or_not(self) -> None:
        never = credit(PolicySettings(expected_steps=1.0))
        assert self.leads(queue("aab"), queue("aab"), policy=never) == ["a", "a"]
        assert never.report()["alpha"] == 1.0

    def test_of_nobody_with_fewer(self) -> None:
        assert self.leads(queue("aabb"), queue("aabbc"), queue("-ab")) == [None, None, None]

    def test_of_the_merged_adapter_though_another_has_more(self) -> None:
        policy = credit(PolicySettings(beta=0.4))
        step(policy, queue("aaaa"))
        choices = self.leads(queue("aabbb", merged="a"), policy=policy)
        assert policy._ordinary is not None and policy._ordinary.alone == "a", "it stays merged"
        assert choices == [None], "two of five are too few"
        assert self.leads(queue("aaabb", merged="a"), policy=policy) == ["a"]

    def test_of_nobody_while_others_are_privileged(self) -> None:
        policy = credit()
        step(policy, queue("aaaa"))
        policy.ledger.move("a", "b", 10.0)
        state = queue("aaaab", merged="a")
        assert policy.choose(state).reason == "privileged"
        assert self.leads(state, policy=policy) == [None]
