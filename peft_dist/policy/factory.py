"""Batching policies by name."""

from __future__ import annotations

from peft_dist.core.cost_model import CostModel
from peft_dist.core.errors import ConfigError
from peft_dist.policy.batching import BatchingPolicy
from peft_dist.policy.credit import CreditPolicy
from peft_dist.policy.fcfs import FirstComePolicy
from peft_dist.policy.merge import MergePolicy
from peft_dist.policy.settings import PolicySettings

POLICIES = ("fcfs", "merge", "credit")
EXEC_TYPES = ("dlora", "peft", "vllm")


def make_policy(
    name: str | None = None,
    exec_type: str = "dlora",
    settings: PolicySettings | None = None,
    cost_model: CostModel | None = None,
) -> BatchingPolicy:
    """The policy ``name`` for a kind of execution; None takes the default, "credit" for "dlora" and "merge" for the
    baselines, which run one adapter at a time and know no other.

    Raises ConfigError for unknown names, and for policies that the kind of execution cannot follow.
    """
    settings = settings or PolicySettings()
    if exec_type not in EXEC_TYPES:
        raise ConfigError(f"exec_type={exec_type!r} is unknown: use {', '.join(EXEC_TYPES)}")
    if name is not None and name not in POLICIES:
        raise ConfigError(f"policy={name!r} is unknown: use {', '.join(POLICIES)}")
    cost = CostModel.paper() if settings.paper_times or cost_model is None else cost_model
    if exec_type != "dlora":
        if name not in (None, "merge"):
            raise ConfigError(f"exec_type={exec_type!r} runs one adapter at a time: policy={name!r} needs 'dlora'")
        return MergePolicy(cost, settings, has_kernel=False, prefix_only=settings.strict_prefix)
    if name == "fcfs":
        return FirstComePolicy(cost, settings)
    if name == "merge":
        return MergePolicy(cost, settings)
    return CreditPolicy(cost, settings)
