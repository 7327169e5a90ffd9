"""Every branch of the credit policy."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from peft_dist.core.cost_model import CostModel, CostPrior
from peft_dist.policy.credit import CreditPolicy
from peft_dist.policy.fcfs import FirstComePolicy
from peft_dist.policy.settings import PolicySettings
from tests.policy.queues import ids, queue, step

PAPER = CostModel.paper()
STEP = 27e-3


def credit(settings: PolicySettings | None = None, cost: CostModel = PAPER) -> CreditPolicy:
    """One that believes every lead to last, until it has seen some end."""
    return CreditPolicy(cost, replace(settings or PolicySettings(), expected_lead=math.inf))


def merged_on_a(settings: PolicySettings | None = None) -> CreditPolicy:
    policy = credit(settings)
    assert step(policy, queue("aaaa")).merged_adapter == "a"
    return policy


class TestEnter:
    def test_enough_requests_of_one_adapter(self) -> None:
        choice = credit().choose(queue("ba" + 16 * "a"))
        assert (choice.merged_adapter, ids(choice)[0], len(choice.candidates)) == ("a", "a1", 16)
        assert choice.reason == "enter"

    def test_too_few(self) -> None:
        choice = credit().choose(queue("b" + 15 * "a" + "c"))
        assert (choice.merged_adapter, choice.reason) == (None, "first come")

    def test_a_lower_threshold_counts_only_while_others_wait_for_a_seat(self) -> None:
        settings = PolicySettings(alpha=0.5, beta=0.4)
        assert credit(settings).choose(queue("aab")).merged_adapter is None
        assert credit(settings).choose(queue("aabb", seats=3)).merged_adapter == "a"

    def test_the_adapter_with_the_most_requests_the_oldest_of_equals(self) -> None:
        settings = PolicySettings(alpha=0.1, beta=0.1, seated_alpha=0.0)
        assert credit(settings).choose(queue("abbcb")).merged_adapter == "b"
        assert credit(settings).choose(queue("cbb" + "c")).merged_adapter == "c"

    def test_not_if_it_cannot_be_merged(self) -> None:
        assert credit().choose(queue("aaa", mergeable=lambda adapter: False)).merged_adapter is None

    def test_not_in_deep_debt(self) -> None:
        policy = credit(PolicySettings(max_debt=1.0))
        policy.ledger.move("a", "b", 100.0)
        assert policy.choose(queue("aaa")).merged_adapter is None

    def test_not_if_the_switches_will_not_be_paid_back(self) -> None:
        # 12 ms a step are saved, two switches take 40 ms.
        assert credit(PolicySettings(expected_steps=3.0)).choose(queue("aaa")).merged_adapter is None
        assert credit(PolicySettings(expected_steps=4.0)).choose(queue("aaa")).merged_adapter == "a"
        many = queue("a" * 32)
        assert credit(PolicySettings(expected_steps=3.0)).choose(many).merged_adapter == "a", "two batches of them wait"
        dont_care = PolicySettings(expected_steps=3.0, amortise=False)
        assert credit(dont_care).choose(queue("aaa")).merged_adapter == "a"

    def test_expected_steps_are_learned(self) -> None:
        policy = credit(PolicySettings(expected_steps=100.0))
        for i in range(100):
            step(policy, queue("ab", now=i * 0.01))
            policy.forget(["a0", "b1"])
        assert policy.report()["expected_steps"] < 3
        assert policy.choose(queue("aaa")).merged_adapter is None

    def test_not_if_leads_have_been_too_short(self) -> None:
        # Another adapter leads each two steps: merging would save 24 ms in each lead, for 40 ms of switches.
        policy = credit(PolicySettings(expected_steps=64.0))
        for i in range(8):
            for _ in range(2):
                step(policy, queue("aab" if i % 2 else "bba"))
        assert policy.report()["expected_lead"] == 2.0
        assert policy.choose(queue("b")).merged_adapter is None

    def test_a_first_lead_is_believed_for_as_long_as_it_has_lasted(self) -> None:
        policy = CreditPolicy(PAPER, PolicySettings(expected_lead=2.0))
        reasons = [step(policy, queue("aa")).reason for _ in range(6)]
        assert reasons == ["first come"] * 4 + ["enter", "enter"], "by then merging would have paid for its switches"

    def test_a_lead_that_lasts_is_believed(self) -> None:
        policy = credit()
        for i in range(9):
            step(policy, queue("aab" if i % 2 else "bba"))
        reasons = [step(policy, queue("aa")).reason for _ in range(6)]
        assert reasons == ["first come"] * 4 + ["enter", "enter"], (
            "from the step on in which four have paid for two switches"
        )

    def test_another_adapter_may_take_over_without_unmerging(self) -> None:
        choice = step(merged_on_a(), queue("a" + 20 * "b", merged="a"))
        assert (choice.merged_adapter, choice.reason) == ("b", "enter")


class TestStay:
    def test_while_enough_requests_are_left(self) -> None:
        choice = step(merged_on_a(), queue("abab" + "a", merged="a"))
        assert (choice.merged_adapter, ids(choice), choice.reason) == ("a", ["a0", "a2", "a4"], "stay")

    def test_not_with_fewer(self) -> None:
        choice = step(merged_on_a(), queue("abab", merged="a"))
        assert (choice.merged_adapter, choice.reason) == (None, "first come")

    def test_not_when_none_are_left(self) -> None:
        assert step(merged_on_a(), queue("bc", merged="a")).merged_adapter is None

    def test_not_in_deep_debt(self) -> None:
        policy = merged_on_a(PolicySettings(max_debt=1.0))
        policy.ledger.move("a", "b", 100.0)
        assert step(policy, queue("aaac", merged="a")).merged_adapter is None

    def test_a_switch_made_by_others_is_noticed(self) -> None:
        policy = merged_on_a()
        assert policy.choose(queue("aab", merged=None)).reason == "first come"
        assert policy.choose(queue("bba", merged="b")).reason == "stay"


class TestBase:
    def test_base_requests_alone_need_no_merge(self) -> None:
        policy = credit()
        choice = step(policy, queue("a" + 16 * "-"))
        assert (choice.merged_adapter, choice.reason) == (None, "enter")
        assert all(c.adapter == "" for c in choice.candidates) and len(choice.candidates) == 16
        assert step(policy, queue("a--")).reason == "stay"
        assert policy.ledger.credit("a") > 0, "the base pays as everybody does"

    def test_base_requests_do_not_join_a_merged_batch(self) -> None:
        assert ids(step(merged_on_a(), queue("-aaa", merged="a"))) == ["a1", "a2", "a3"]


class TestCredits:
    def test_the_merged_adapter_pays_whom_it_displaces(self) -> None:
        policy = merged_on_a()
        step(policy, queue("abca", merged="a", seats=3))
        assert policy.credits == pytest.approx({"a": -15e-3 / 3 * 2, "b": 5e-3, "c": 5e-3})

    def test_a_first_come_batch_costs_nothing(self) -> None:
        policy = credit()
        step(policy, queue("abc", loras=1))
        assert policy.credits == {"a": 0, "b": 0, "c": 0}

    def test_a_privileged_adapter_goes_first_and_unmerged(self) -> None:
        policy = merged_on_a()
        policy.ledger.move("a", "b", 0.13)
        choice = step(policy, queue("aaabb", merged="a", seats=4))
        assert (choice.merged_adapter, choice.reason) == (None, "privileged")
        assert ids(choice) == ["b3", "b4", "a0", "a1"]
        assert policy.ledger.credit("b") < 0.13, "and pays"

    def test_it_pays_also_for_passing_others_in_a_first_come_batch(self) -> None:
        policy = credit()
        policy.ledger.move("x", "b", 1.0)
        choice = step(policy, queue("acacacb", seats=4))
        assert (ids(choice), choice.reason) == (["b6", "a0", "c1", "a2"], "privileged")
        assert policy.credits == pytest.approx({"x": -1.0, "b": 1.0 - STEP / 4, "a": 0.0, "c": STEP / 4})

    def test_hysteresis(self) -> None:
        policy = merged_on_a()
        policy.ledger.move("a", "b", 0.12)
        reasons, merged = [], "a"
        for _ in range(100):
            choice = step(policy, queue("aaaaaaaaab", merged=merged, seats=9))
            merged = choice.merged_adapter
            reasons.append(choice.reason)
        stretch = reasons.index("enter")
        assert reasons[:stretch] == ["privileged"] * stretch and stretch > 5, "until half of the gap is spent"
        assert "privileged" not in reasons[stretch:], "b is not of the first nine, and so not displaced"

    def test_nothing_changes_if_the_privileged_run_anyway(self) -> None:
        policy = credit()
        policy.ledger.move("a", "b", 1.0)
        choice = step(policy, queue("acb"))
        assert (ids(choice), choice.reason) == (["a0", "c1", "b2"], "first come")

    def test_the_gap_is_a_few_interruptions(self) -> None:
        policy = credit()
        step(policy, queue("aab"))
        assert policy.report()["credit_gap"] == pytest.approx(1.5 * 67e-3)

    def test_departed_adapters_take_nothing_with_them(self) -> None:
        policy = merged_on_a()
        step(policy, queue("abca", merged="a", seats=3))
        for adapter in "abc":
            policy.forget_adapter(adapter)
        assert policy.credits == {} and policy.ledger.total == pytest.approx(0)


class TestUrgent:
    def test_the_overtaken_go_first_unmerged(self) -> None:
        policy = merged_on_a(PolicySettings(max_adapter_wait=1.0, credit_gap=1e9))
        choices, merged = [], "a"
        for i in range(12):
            choices.append(step(policy, queue("aaaaaaba", merged=merged, now=i / 10)))
            merged = choices[-1].merged_adapter
        first = next(i for i, choice in enumerate(choices) if choice.reason == "urgent")
        assert first == 10
        assert choices[first].merged_adapter is None and ids(choices[first])[0] == "b6"
        assert len(ids(choices[first])) == 8, "the others fill the seats"
        assert policy.ledger.credit("b") < sum(15e-3 / 8 for _ in range(first)), "they pay for it"

    def test_unless_the_batch_overtakes_none_of_them(self) -> None:
        policy = merged_on_a(PolicySettings(max_adapter_wait=0.0))
        assert step(policy, queue("aaaab", merged="a")).reason == "stay"
        assert step(policy, queue("aabaa", merged="a")).reason == "urgent"


class TestTuning:
    def test_the_end_of_a_merged_period_tunes_alpha(self) -> None:
        policy = merged_on_a()
        for _ in range(20):
            step(policy, queue("aaaa", merged="a"))
        step(policy, queue("abab", merged="a"))
        assert policy.tuner.alpha == pytest.approx(0.95)

    def test_the_end_of_an_unmerged_period_tunes_beta(self) -> None:
        policy = credit()
        for _ in range(20):
            step(policy, queue("aaab"))
        step(policy, queue("aaaa"))
        assert policy.report()["beta"] == pytest.approx(15 / 27 / 1.1)

    def test_while_unmerged_a_new_leader_counts_as_a_switch(self) -> None:
        policy = credit(PolicySettings(amortise=False))
        for i in range(20):
            step(policy, queue("aaab" if i % 2 else "abbb"))
        step(policy, queue("aaaa"))
        assert policy.report()["beta"] == pytest.approx(15 / 27 + 0.05)

    def test_privileged_steps_count_for_neither_mode(self) -> None:
        policy = merged_on_a()
        policy.ledger.move("a", "b", 0.14)
        step(policy, queue("aaab", merged="a", seats=3))
        assert policy.tuner.period.merge_requests == 0

    def test_a_step_that_did_not_run_counts_for_nothing(self) -> None:
        policy = merged_on_a()
        before = policy.report()
        step(policy, queue("abab", merged="a"), scheduled=[])
        assert policy.report() == before and policy.credits == {"a": 0}


@pytest.mark.parametrize(
    "prior",
    [
        CostPrior(lora_step=0.0, lora_token=0.0, adapter=0.0),
        CostPrior(merged_step=0.1),
        CostPrior(merge=(1e6, 0.0), unmerge=(1e6, 0.0)),
    ],
    ids=["no overhead", "slower merged", "never amortised"],
)
def test_where_merging_cannot_pay_it_is_first_come_first_served(prior: CostPrior) -> None:
    cost = CostModel(prior, fixed=True)
    policy, reference = credit(cost=cost), FirstComePolicy(cost, PolicySettings())
    for i, letters in enumerate(["aaaa", "aab", "a" * 40, "-aab", "--", "abcabcabc"] * 50):
        state = queue(letters, now=i / 5, loras=2)
        choice, expected = step(policy, state), step(reference, state)
        assert (choice.merged_adapter, ids(choice)) == (expected.merged_adapter, ids(expected))
    assert set(policy.credits.values()) == {0.0}


@pytest.mark.parametrize(("slower", "reason"), [(0.0, "stay"), (1e-4, "stay"), (1e-2, "first come")])
def test_a_merged_period_ends_when_staying_costs_more_than_unmerging(slower: float, reason: str) -> None:
    prior = CostPrior(merged_step=slower, lora_step=0.0, lora_token=0.0, adapter=0.0)
    choice = step(credit(cost=CostModel(prior, fixed=True)), queue("aaa", merged="a"))
    assert choice.reason == reason


def test_one_long_prompt_does_not_end_a_merged_period() -> None:
    prior = CostPrior(merged_token=1e-3, lora_step=5e-3, lora_token=0.0, adapter=0.0)
    policy = credit(cost=CostModel(prior, fixed=True))
    for _ in range(5):
        assert step(policy, queue("aaa")).merged_adapter == "a"
    long = {2: 30}
    assert step(policy, queue("aaa", merged="a", prompts=long)).reason == "stay"
    reasons = [step(policy, queue("aaa", merged="a", prompts=long)).reason for _ in range(5)]
    assert "first come" in reasons, "but many do"


def test_the_artifacts_profile() -> None:
    policy = credit(PolicySettings.artifact())
    assert (policy.tuner.alpha, policy.tuner.beta(1.0)) == pytest.approx((1.0, 15 / 27))
    step(policy, queue("a" * 17 + "b", seats=32))
    choice = step(policy, queue("ba" + "a" * 17, merged="a", seats=32))
    assert len(choice.candidates) == 16
    assert policy.credits == pytest.approx({"a": -0.1125, "b": 0.1125})
    assert policy.ledger.gap == 10_000
    policy.ledger.move("c", "b", 10_000.0)
    assert step(policy, queue("a" * 16 + "b", merged="a")).reason == "privileged"
    assert policy.ledger.credit("b") == pytest.approx(10_000.1125 - 0.0625)
