"""Whatever arrives: nobody starves, nothing is lost, no limit is passed, and the books balance."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given

from peft_dist.core.cost_model import CostModel, CostPrior
from peft_dist.policy.credit import CreditPolicy
from peft_dist.policy.factory import make_policy
from peft_dist.policy.settings import PolicySettings
from tests.policy.virtual import History, Job, Replica
from tests.thorough import examples

BOUND = 0.3
PRIOR = CostPrior(
    step=10e-3,
    decode_sequence=1e-3,
    prefill_token=1e-4,
    lora_step=8e-3,
    lora_token=1e-4,
    adapter=1e-3,
    merge=(15e-3, 1e-5),
    unmerge=(5e-3, 0.0),
)


@st.composite
def workloads(draw: st.DrawFn) -> list[Job]:
    now, jobs = 0.0, []
    for index in range(draw(st.integers(1, 25))):
        now += draw(st.sampled_from([0.0, 0.0, 0.01, 0.1, 1.0]))
        adapter = draw(st.sampled_from(["a", "a", "a", "b", "c", "d", ""]))
        prompt, output = draw(st.sampled_from([1, 5, 80])), draw(st.integers(1, 40))
        jobs.append(Job(f"r{index:03d}", adapter, now, prompt, output, 16 if adapter else 0))
    return jobs


replicas = st.fixed_dictionaries(
    {
        "max_num_seqs": st.sampled_from([1, 2, 4, 16]),
        "max_num_batched_tokens": st.sampled_from([4, 64, 1000]),
        "max_loras": st.sampled_from([1, 2, 8]),
        "depth": st.sampled_from([0, 1]),
        "mergeable": st.sampled_from([lambda adapter: True, lambda adapter: adapter != "a"]),
        "can_host": st.sampled_from([lambda adapter: True, lambda adapter: adapter not in "ab"]),
    }
)
policies = st.sampled_from([("fcfs", False), ("merge", False), ("credit", False), ("credit", True)])
light = examples(30, 60, suppress_health_check=[HealthCheck.too_slow])


def simulate(name: str, minority: bool, jobs: list[Job], options: dict) -> tuple[History, object]:
    cost = CostModel(PRIOR, fixed=True)
    in_flight = options.get("depth", 0)
    chosen = PolicySettings(max_adapter_wait=BOUND, merged_minority=minority, steps_in_flight=in_flight)
    policy = make_policy(name, "dlora", chosen, cost)
    return Replica(policy, cost, **options).run(jobs, max_steps=20_000), policy


@light
@given(workloads(), replicas, policies)
def test_nobody_is_lost_run_twice_or_overtaken_for_longer_than_the_bound(
    jobs: list[Job], options: dict, policy: tuple[str, bool]
) -> None:
    """The driver itself asserts that seats, adapters and mergeability are respected in every step."""
    history, _ = simulate(*policy, jobs, options)
    assert history.finished.keys() == {job.request_id for job in jobs}
    step = max(s.seconds for s in history.steps)
    # One step is under way when the bound is reached, and with one in flight another is already submitted.
    assert history.longest_gap() <= BOUND + (1 + options["depth"]) * step + 1e-9


def test_seconds_are_counted_for_the_step_that_takes_them() -> None:
    """Found above: steps of two lengths in turn, one in flight. Counted for the newest one, the errors added up."""
    lengths = [("a", n) for n in (*[1] * 10, 8, 15, 23)]
    lengths += [
        ("b", 33),
        ("", 1),
        ("b", 11),
        ("a", 1),
        ("", 10),
        ("a", 1),
        ("c", 1),
        ("c", 1),
        ("b", 15),
        ("a", 1),
        ("a", 1),
    ]
    jobs = [Job(f"r{i:03d}", adapter, 0.0, 1, n, 16 if adapter else 0) for i, (adapter, n) in enumerate(lengths)]
    options = {"max_num_seqs": 1, "max_num_batched_tokens": 4, "max_loras": 1, "mergeable": lambda a: a != "a"}
    history, policy = simulate("credit", False, jobs, {**options, "depth": 1})
    # The driver forgets a wait when somebody runs; who runs a short step has not paid back all of it by that.
    shortest = min(step.seconds for step in history.steps)
    assert -1e-9 <= policy.overtaking.longest_ever - history.longest_gap() <= shortest
    assert history.longest_gap() <= BOUND + 2 * max(step.seconds for step in history.steps)


@light
@given(workloads(), replicas, st.booleans())
def test_credits_are_conserved_and_thresholds_ordered(jobs: list[Job], options: dict, minority: bool) -> None:
    balances: list[float] = []

    class Watched(CreditPolicy):
        def ran(self, state, choice, scheduled):  # type: ignore[no-untyped-def]
            super().ran(state, choice, scheduled)
            balances.append(self.ledger.total)
            assert 0 < self.tuner.beta(self.report()["speed_ratio"]) <= self.tuner.alpha

    cost = CostModel(PRIOR, fixed=True)
    policy = Watched(cost, PolicySettings(max_adapter_wait=BOUND, merged_minority=minority))
    Replica(policy, cost, **options).run(jobs)
    assert max(map(abs, balances)) < 1e-9
    assert policy.credits == {}, "nothing is kept for adapters without requests"
    assert policy.overtaking.longest == 0


@light
@given(workloads(), replicas, policies)
def test_the_same_queue_gives_the_same_steps(jobs: list[Job], options: dict, policy: tuple[str, bool]) -> None:
    first, second = (simulate(*policy, jobs, options)[0] for _ in range(2))
    assert [(s.start, s.choice.merged_adapter, s.scheduled) for s in first.steps] == [
        (s.start, s.choice.merged_adapter, s.scheduled) for s in second.steps
    ]


@light
@given(workloads(), replicas)
def test_without_gain_credit_is_first_come_first_served(jobs: list[Job], options: dict) -> None:
    cost = CostModel(CostPrior(lora_step=0.0, lora_token=0.0, adapter=0.0), fixed=True)
    chosen = PolicySettings(max_adapter_wait=BOUND)
    runs = [Replica(make_policy(name, "dlora", chosen, cost), cost, **options).run(jobs) for name in ("credit", "fcfs")]
    assert [(s.start, s.scheduled) for s in runs[0].steps] == [(s.start, s.scheduled) for s in runs[1].steps]


@pytest.mark.parametrize("name", ["fcfs", "merge", "credit"])
def test_a_thousand_adapters_that_come_and_go_leave_nothing_behind(name: str) -> None:
    jobs = [Job(f"r{i:05d}", f"adapter-{i // 2}", i * 0.02, 1, 3) for i in range(2000)]
    cost = CostModel(PRIOR, fixed=True)
    policy = make_policy(name, "dlora", PolicySettings(), cost)
    Replica(policy, cost).run(jobs)
    assert policy.credits == {} and policy.report()["longest_overtaken_seconds"] == 0
