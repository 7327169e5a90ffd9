"""With the paper's times, dLoRA's policy is never worse than the better of the two simple ones, and often better."""

from __future__ import annotations

import pytest

from peft_dist.core.cost_model import CostModel, CostPrior
from peft_dist.policy.factory import make_policy
from peft_dist.policy.settings import PolicySettings
from tests.policy.comparison import Load, compare
from tests.policy.virtual import Replica, poisson_jobs
from tests.thorough import some_of

# Unmerged, 16 seats serve about 9 of these requests a second, merged 16.
LIGHT, NEAR, OVER = 3.0, 8.0, 11.0
SHORT = 30.0
# In the manner of a small model on two processor cores.
SLOW = CostPrior(
    step=12e-3,
    decode_sequence=8e-4,
    prefill_token=1e-3,
    lora_step=6e-3,
    lora_token=4e-4,
    adapter=3e-4,
    merge=(0.1, 0.0),
    unmerge=(0.05, 0.0),
)


@pytest.mark.parametrize("rate", [LIGHT, NEAR])
@pytest.mark.parametrize("share", some_of([0.25, 0.5, 0.7, 0.9, 1.0]))
def test_no_worse_than_the_better_one(share: float, rate: float) -> None:
    outcomes = compare(Load(4, share, rate, SHORT))
    best_mean = min(outcomes["fcfs"].mean, outcomes["merge"].mean)
    best_p90 = min(outcomes["fcfs"].p90, outcomes["merge"].p90)
    assert outcomes["credit"].mean <= 1.03 * best_mean
    assert outcomes["credit"].p90 <= 1.10 * best_p90


@pytest.mark.parametrize(("share", "rate", "factor"), [(0.9, LIGHT, 0.9), (0.9, NEAR, 0.9), (0.7, OVER, 0.5)])
def test_better_than_both_under_skew(share: float, rate: float, factor: float) -> None:
    outcomes = compare(Load(8, share, rate, SHORT))
    assert outcomes["credit"].mean < factor * min(outcomes["fcfs"].mean, outcomes["merge"].mean)


@pytest.mark.parametrize("rate", [LIGHT, NEAR])
def test_one_adapter_alone_is_merged_for_good_though_the_model_starts_from_another_machine(rate: float) -> None:
    truth = CostModel(SLOW, fixed=True)
    for seed in range(2):
        jobs = poisson_jobs(seed, SHORT, rate, 1, 1.0)
        learner = CostModel()
        learned = Replica(make_policy("credit", cost_model=learner), truth, learner=learner).run(jobs)
        merged = Replica(make_policy("merge", cost_model=truth), truth).run(jobs)
        # It begins once its first lead has lasted for long enough to pay.
        assert learned.mean <= 1.05 * merged.mean and learned.num_switches <= 3


def test_the_bound_holds_in_overload() -> None:
    settings = PolicySettings(max_adapter_wait=2.0)
    outcomes = compare(Load(8, 0.7, OVER, SHORT), seeds=[0], settings=settings)
    for outcome in outcomes.values():
        assert outcome.longest_gap <= 2.0 + 0.1


def test_the_artifacts_profile_gains_too_but_does_not_bound_the_wait() -> None:
    load, artifact = Load(8, 0.9, OVER, SHORT), PolicySettings.artifact()
    outcomes = compare(load, seeds=[0], settings=artifact)
    assert outcomes["credit"].mean < min(outcomes["fcfs"].mean, outcomes["merge"].mean)
    assert outcomes["credit"].longest_gap > 5.0
