"""Policies by name, and settings that make sense."""

from __future__ import annotations

import math
from typing import Any

import pytest

from peft_dist.core.cost_model import CostModel, CostPrior
from peft_dist.core.errors import ConfigError
from peft_dist.policy.credit import CreditPolicy
from peft_dist.policy.factory import make_policy
from peft_dist.policy.fcfs import FirstComePolicy
from peft_dist.policy.merge import MergePolicy
from peft_dist.policy.settings import PolicySettings


@pytest.mark.parametrize(
    ("name", "kind"),
    [("fcfs", FirstComePolicy), ("merge", MergePolicy), ("credit", CreditPolicy), (None, CreditPolicy)],
)
def test_dlora(name: str | None, kind: type) -> None:
    policy = make_policy(name)
    assert type(policy) is kind
    assert not isinstance(policy, MergePolicy) or (policy.has_kernel and not policy.prefix_only)


@pytest.mark.parametrize("exec_type", ["peft", "vllm"])
def test_baselines_merge_fairly_but_in_the_artifacts_profile(exec_type: str) -> None:
    for name in (None, "merge"):
        policy = make_policy(name, exec_type)
        assert isinstance(policy, MergePolicy) and not policy.has_kernel and not policy.prefix_only
        policy = make_policy(name, exec_type, PolicySettings.artifact())
        assert isinstance(policy, MergePolicy) and policy.prefix_only


def test_errors_name_the_choices() -> None:
    with pytest.raises(ConfigError, match="fcfs, merge, credit"):
        make_policy("best")
    with pytest.raises(ConfigError, match="dlora, peft, vllm"):
        make_policy("merge", "cuda")
    with pytest.raises(ConfigError, match="needs 'dlora'"):
        make_policy("credit", "peft")


def test_the_artifact_takes_the_papers_times_and_others_the_given_model() -> None:
    cost = CostModel(CostPrior(step=1.0))
    assert make_policy("credit", settings=PolicySettings.artifact(), cost_model=cost).cost is not cost  # type: ignore[attr-defined]
    assert make_policy("credit", cost_model=cost).cost is cost  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_adapter_wait": -1.0},
        {"max_adapter_wait": math.nan},
        {"aimd_add": 0.0},
        {"aimd_mul": 1.0},
        {"alpha": 0.0},
        {"alpha": 1.5},
        {"beta": 0.0},
        {"beta": 1.1},
        {"credit_gap": 0.0},
        {"credit_hysteresis": 2.0},
        {"expected_steps": 0.5},
        {"expected_lead": -1.0},
        {"max_num_seqs": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PolicySettings(**wrong)
