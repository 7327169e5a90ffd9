"""Policies side by side in virtual time; also for scripts that make tables of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peft_dist.core.cost_model import CostModel
from peft_dist.policy.factory import make_policy
from peft_dist.policy.settings import PolicySettings
from tests.policy.virtual import History, Replica, poisson_jobs

POLICIES = ("fcfs", "merge", "credit")


@dataclass(frozen=True, slots=True)
class Load:
    """Poisson arrivals of requests with 32 prompt and on average 64 output tokens on one replica."""

    num_adapters: int
    hot_share: float
    request_rate: float
    seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Means over seeds, in seconds a token; the longest time, in seconds, for which a request was overtaken."""

    mean: float
    p90: float
    switches: float
    longest_gap: float


def simulate(
    name: str, load: Load, seed: int, cost: CostModel | None = None, settings: PolicySettings | None = None
) -> History:
    """One run of one policy; the paper's times and 16 seats by default."""
    truth = cost or CostModel.paper()
    policy = make_policy(name, "dlora", settings or PolicySettings(), truth)
    jobs = poisson_jobs(seed, load.seconds, load.request_rate, load.num_adapters, load.hot_share)
    return Replica(policy, truth).run(jobs)


def compare(
    load: Load,
    seeds: Iterable[int] = (0, 1, 2),
    cost: CostModel | None = None,
    settings: PolicySettings | None = None,
    names: Iterable[str] = POLICIES,
) -> dict[str, Outcome]:
    """Outcomes by policy, on the same arrivals."""
    seeds = list(seeds)
    return {name: summarise([simulate(name, load, seed, cost, settings) for seed in seeds]) for name in names}


def summarise(histories: list[History]) -> Outcome:
    def average(values: list[float]) -> float:
        return sum(values) / len(values)

    return Outcome(
        average([h.mean for h in histories]),
        average([sorted(h.seconds_per_token)[int(0.9 * len(h.jobs))] for h in histories]),
        average([h.num_switches for h in histories]),
        max(h.longest_gap() for h in histories),
    )
