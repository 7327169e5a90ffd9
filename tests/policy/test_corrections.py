"""Merged with corrections: weighed by predicted tokens a second."""

from __future__ import annotations

import math

from peft_dist.core.cost_model import CostModel, CostPrior
from peft_dist.policy.batching import Choice
from peft_dist.policy.corrections import with_corrections
from peft_dist.policy.credit import CreditPolicy
from peft_dist.policy.queue_view import QueueView
from peft_dist.policy.settings import PolicySettings
from tests.policy.queues import ids, queue, step, view

SETTINGS = PolicySettings(merged_minority=True, max_adapter_wait=1e9, credit_gap=1e9, expected_lead=math.inf)
# Each row through the kernel costs a lot, the kernel itself little.
BY_ROW = CostPrior(step=10e-3, decode_sequence=1e-3, lora_step=0.0, lora_token=2e-3, adapter=0.0)
# The other way round: whoever needs the kernel at all pays for it.
BY_STEP = CostPrior(step=10e-3, decode_sequence=0.0, lora_step=40e-3, lora_token=0.0, adapter=0.0)


def policy(prior: CostPrior, settings: PolicySettings = SETTINGS) -> CreditPolicy:
    return CreditPolicy(CostModel(prior, fixed=True), settings)


def test_a_minority_joins_when_its_rows_are_cheap() -> None:
    choice = step(policy(BY_ROW), queue("aaaaab-aaaaaa"))
    assert (choice.merged_adapter, choice.reason) == ("a", "corrected")
    assert ids(choice)[4:8] == ["a4", "b5", "-6", "a7"], "in order of age"


def test_not_when_unasked_for() -> None:
    asked_not = PolicySettings(max_adapter_wait=1e9, expected_lead=math.inf)
    assert step(policy(BY_ROW, asked_not), queue("aaaaab-aaaaaa")).reason == "first come"


def test_merged_only_wins_when_the_kernel_is_dear() -> None:
    subject = policy(BY_STEP)
    assert step(subject, queue("aaaaaaaa")).reason == "enter"
    assert step(subject, queue("aaaaaaab", merged="a")).reason == "stay"


def test_unmerged_wins_when_most_rows_would_need_correcting() -> None:
    # Merging, with corrections, would save 1 of 8 rows the kernel.
    dear = CostPrior(step=10e-3, decode_sequence=1e-3, lora_step=0.0, lora_token=1e-6, adapter=0.0, rank_row_token=1e-4)
    choice = step(policy(dear), queue("abcdefgh"))
    assert (choice.merged_adapter, choice.reason) == (None, "first come")


def test_a_switch_must_be_worth_it() -> None:
    slow = CostPrior(step=10e-3, decode_sequence=1e-3, lora_step=0.0, lora_token=2e-3, merge=(1e4, 0.0))
    assert step(policy(slow), queue("aaaaab-aaaaaa")).merged_adapter is None


def test_adapters_that_cannot_be_merged_are_no_hosts() -> None:
    choice = step(policy(BY_ROW), queue("aaaaab-aaaaaa", mergeable=lambda adapter: adapter != "a"))
    assert choice.merged_adapter != "a"


def test_a_batch_that_nobody_joins_is_left_to_the_thresholds() -> None:
    settings = PolicySettings(merged_minority=True, alpha=1.5, max_alpha=1.5, expected_lead=math.inf)
    assert step(policy(BY_ROW, settings), queue("a" * 16 + "b")).reason == "first come"


def test_a_corrected_period_is_a_merged_period() -> None:
    subject = policy(CostPrior(step=10e-3, decode_sequence=1e-3, lora_step=0.0, lora_token=5e-4, adapter=0.0))
    for _ in range(5):
        choice = step(subject, queue("aaaaab-aaaaaa", merged="a"))
    assert choice.reason == "corrected"
    assert subject.ledger.credit("a") <= 0
    step(subject, queue("bc", merged="a"))
    assert subject.tuner.period.merge_requests <= 1, "a new period began"


def first_come(queued: QueueView) -> Choice:
    return Choice(None, queued.first_come, "first come")


def test_only_adapters_that_can_be_merged_are_hosts_also_when_named() -> None:
    for merged, leader in [(None, "a"), ("a", None)]:
        queued = view("aaab", CostModel(BY_ROW, fixed=True), merged=merged, mergeable=lambda adapter: adapter != "a")
        choice = first_come(queued)
        assert with_corrections(queued, choice, leader, 64.0) is choice


def test_the_base_is_no_host() -> None:
    # Were it one, it would be spared the unmerge.
    dear = CostPrior(step=10e-3, lora_step=0.0, lora_token=2e-3, merge=(0.0, 0.0), unmerge=(1.0, 0.0))
    queued = view("---a", CostModel(dear, fixed=True), merged="x")
    choice = first_come(queued)
    assert with_corrections(queued, choice, "", 64.0) is choice


def test_where_it_is_all_the_same_the_choice_stands() -> None:
    free = CostPrior(lora_step=0.0, lora_token=0.0, adapter=0.0, merge=(0.0, 0.0))
    queued = view("aab", CostModel(free, fixed=True))
    choice = first_come(queued)
    assert with_corrections(queued, choice, "a", 64.0) is choice


def test_others_join_the_choices_own_adapter() -> None:
    queued = view("aaab", CostModel(BY_ROW, fixed=True))
    alone = Choice("a", queued.alone("a"), "enter")
    corrected = with_corrections(queued, alone, None, 1e9)
    assert (corrected.merged_adapter, ids(corrected)) == ("a", ["a0", "a1", "a2", "b3"])


def test_or_the_one_merged_now_when_the_leader_is_not_worth_the_switch() -> None:
    queued = view("aaaabbbbb", CostModel(BY_ROW, fixed=True), merged="a")
    assert with_corrections(queued, first_come(queued), "b", 1.0).merged_adapter == "a"
    assert with_corrections(queued, first_come(queued), "b", 1e9).merged_adapter == "b"


def test_the_best_host_wins_and_not_the_last_that_is_better_than_none() -> None:
    queued = view("aaabb", CostModel(BY_ROW, fixed=True), merged="a")
    assert with_corrections(queued, first_come(queued), "b", 1e9).merged_adapter == "a"


def test_what_counts_is_tokens_and_not_requests() -> None:
    queued = view("aab", CostModel(BY_STEP, fixed=True), merged="a", prompts={2: 100})
    alone = Choice("a", queued.alone("a"), "stay")
    assert with_corrections(queued, alone, "a", 64.0).reason == "corrected"
