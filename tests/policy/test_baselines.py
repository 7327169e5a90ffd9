"""First come, first served; merged only; and the bound that both keep."""

from __future__ import annotations

import pytest

from peft_dist.core.cost_model import CostModel
from peft_dist.policy.fcfs import FirstComePolicy
from peft_dist.policy.merge import MergePolicy
from peft_dist.policy.settings import PolicySettings
from tests.policy.queues import ids, queue, step

PAPER = CostModel.paper()
ARTIFACT = PolicySettings.artifact()


def fcfs(settings: PolicySettings | None = None) -> FirstComePolicy:
    return FirstComePolicy(PAPER, settings or PolicySettings())


def merge(settings: PolicySettings | None = None, **kwargs: bool) -> MergePolicy:
    return MergePolicy(PAPER, settings or PolicySettings(), **kwargs)


class TestFirstCome:
    def test_oldest_first_unmerged(self) -> None:
        choice = fcfs().choose(queue("abc-a", merged="a", seats=4))
        assert (choice.merged_adapter, ids(choice), choice.reason) == (None, ["a0", "b1", "c2", "-3"], "first come")

    def test_the_artifacts_rule_is_a_prefix_with_16_seats(self) -> None:
        assert ids(fcfs(ARTIFACT).choose(queue("abca", loras=2))) == ["a0", "b1"]
        assert len(fcfs(ARTIFACT).choose(queue("a" * 40, seats=40)).candidates) == 16
        assert len(fcfs().choose(queue("a" * 40, seats=40)).candidates) == 40

    def test_one_that_has_no_slot_gets_one_in_time(self) -> None:
        policy = fcfs(PolicySettings(max_adapter_wait=1.0))
        runs = [ids(step(policy, queue("abac", now=i / 10, loras=1))) for i in range(20)]
        assert runs[0] == ["a0", "a2"]
        first = runs.index(["b1"])
        assert 9 <= first <= 10, "a2 is younger, and a0, which is older, is not urgent"
        assert runs[first + 4] == ["b1"], "until half of its wait is paid back"
        assert runs[first + 6] == ["a0", "a2"]

    def test_nobody_urgent_is_passed_by_younger_ones(self) -> None:
        choice = fcfs(PolicySettings(max_adapter_wait=0.0)).choose(queue("bcb", loras=1))
        assert (ids(choice), choice.reason) == (["b0"], "urgent"), "b2 is younger than c1"
        assert choice.urgent == {"b0", "c1", "b2"}

    @pytest.mark.parametrize(("merged", "reason"), [(None, "first come"), ("x", "urgent")])
    def test_the_switch_counts_towards_the_bound(self, merged: str | None, reason: str) -> None:
        policy = fcfs(PolicySettings(max_adapter_wait=1.0))
        step(policy, queue("aba", loras=1))
        # 27 ms more would be within the bound, 47 ms not.
        assert policy.choose(queue("aba", loras=1, now=0.96, merged=merged)).reason == reason

    def test_who_waits_for_an_adapter_that_could_be_there_is_overtaken(self) -> None:
        policy = fcfs()
        for now in (0.0, 2.0):
            step(policy, queue("ab", absent="a", loras=1, now=now))
        assert policy.report()["longest_overtaken_seconds"] == 2.0

    def test_nothing_to_run(self) -> None:
        policy = fcfs()
        choice = step(policy, queue("a", absent="a", merged="b"))
        assert (choice.merged_adapter, choice.candidates, choice.reason) == ("b", [], "idle")


class TestMerge:
    def test_all_requests_of_the_oldest_ones_adapter(self) -> None:
        choice = merge().choose(queue("baba-b", seats=2))
        assert (choice.merged_adapter, ids(choice), choice.reason) == ("b", ["b0", "b2"], "oldest")

    def test_the_base_runs_alone_and_unmerged(self) -> None:
        choice = merge().choose(queue("-a-", merged="a"))
        assert (choice.merged_adapter, ids(choice)) == (None, ["-0", "-2"])

    def test_an_adapter_that_cannot_be_merged_runs_unmerged_with_others(self) -> None:
        queued = queue("abb", mergeable=lambda adapter: adapter != "a")
        choice = merge().choose(queued)
        assert (choice.merged_adapter, ids(choice), choice.reason) == (None, ["a0", "b1", "b2"], "not mergeable")
        choice = merge(has_kernel=False).choose(queued)
        assert (choice.merged_adapter, ids(choice)) == ("a", ["a0"])

    def test_the_artifacts_baselines_take_a_prefix(self) -> None:
        assert ids(merge(prefix_only=True).choose(queue("aabaa"))) == ["a0", "a1"]
        assert ids(merge(prefix_only=True).choose(queue("aaab", seats=2))) == ["a0", "a1"]

    def test_the_adapter_of_the_oldest_urgent_request_comes_next(self) -> None:
        policy = merge(PolicySettings(max_adapter_wait=1.0))
        choices = [step(policy, queue("abab", now=i / 10)) for i in range(12)]
        first = next(i for i, choice in enumerate(choices) if choice.reason == "urgent")
        assert 8 <= first <= 10
        assert ids(choices[first]) == ["b1", "b3"] and choices[first].merged_adapter == "b"

    def test_and_does_not_overtake_urgent_requests_of_others(self) -> None:
        policy = merge(PolicySettings(max_adapter_wait=1.0))
        choices = [step(policy, queue("abcaabc", now=i / 10)) for i in range(12)]
        urgent = [ids(choice) for choice in choices if choice.reason == "urgent"]
        assert urgent and all(members == ["b1"] for members in urgent), "b5 is younger than c2"

    def test_of_the_others_the_oldest_is_the_limit(self) -> None:
        choice = merge(PolicySettings(max_adapter_wait=0.0)).choose(queue("abaca"))
        assert (ids(choice), choice.reason) == (["a0"], "urgent")

    def test_urgent_and_not_mergeable(self) -> None:
        policy = merge(PolicySettings(max_adapter_wait=1.0))
        queued = [queue("aba", now=i / 10, mergeable=lambda adapter: adapter != "b") for i in range(12)]
        choice = [step(policy, state) for state in queued][-1]
        assert choice.merged_adapter is None and choice.candidates[0].request_id == "b1"


def test_ran_follows_choose() -> None:
    policy, state = fcfs(), queue("ab")
    choice = policy.choose(state)
    with pytest.raises(ValueError, match="last choose"):
        policy.ran(queue("ab"), choice, ["a0"])
    policy.choose(state)
    with pytest.raises(ValueError, match="last choose"):
        policy.ran(state, choice, ["a0"])
    choice = policy.choose(state)
    policy.ran(state, choice, ["a0"])
    with pytest.raises(ValueError, match="once"):
        policy.ran(state, choice, ["a0"])


def test_reports() -> None:
    policy = fcfs()
    for now in (0.0, 2.0):
        step(policy, queue("aba", loras=1, now=now))
    assert policy.report() == {"longest_overtaken_seconds": 2.0}
    assert policy.credits == {}
    policy.forget_adapter("a")
