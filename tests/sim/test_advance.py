"""Many steps at once are the same steps: what engines decided, what they are left with, what became of requests."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pytest

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.batch import Batch
from peft_dist.core.config import EngineConfig
from peft_dist.core.cost_model import CostModel
from peft_dist.core.messages import AnyReport, Progress
from peft_dist.engine.advance import Stretch
from peft_dist.engine.stopping import find_plain_end
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.placement.triggers import TriggerSettings
from peft_dist.sim.replica import SimHardware, SimReplica
from peft_dist.sim.simulator import Outcome, SimCluster, Simulator
from tests.thorough import some_of

Step = tuple[float, str | None, list[tuple[str, int]]]
WORKLOADS = 200
FIRSTS = range(0, WORKLOADS, 20)
SMALL, LARGE = (5, 15, 25), (40, 80, 120)
INTERRUPTIONS = ("switches", "preemptions", "evictions", "moves")


@dataclass(frozen=True)
class Coming:
    time: float
    adapter: str | None
    prompt_tokens: int
    output_tokens: int


class Recorded(Simulator):
    """Keeps every step of every replica: when it began, what was merged, and who computed how many tokens. And of every
    report with details: when it came, from whom, and what it said."""

    def _set_up(self) -> None:
        self.details: list[tuple[float, int, Progress]] = []
        observe = self.core.observe

        def recorded_observe(replica_id: int, epoch: int, report: AnyReport, now: float) -> Any:
            if isinstance(report, Progress) and report.detail is not None:
                self.details.append((now, replica_id, report))
            return observe(replica_id, epoch, report, now)

        self.core.observe = recorded_observe  # type: ignore[method-assign]
        super()._set_up()
        self.steps: list[list[Step]] = [record(replica) for replica in self.replicas]


def record(replica: SimReplica) -> list[Step]:
    steps: list[Step] = []
    executor, advance = replica.executor, replica.run.advance
    submit: Callable[[Batch], Any] = executor.submit
    carry_out: Callable[..., Any] = advance.carry_out

    def recorded_submit(batch: Batch) -> Any:
        who = [(sequence.request_id, sequence.num_tokens) for sequence in batch.sequences]
        steps.append((replica.now, batch.merged_adapter, who))
        return submit(batch)

    def recorded_stretch(stretch: Stretch, starts: Sequence[float], *more: Any, **options: Any) -> Any:
        begin = set(stretch.begin)
        order = advance.requests(stretch)
        ends = replica.engine.eos_token_ids, replica.engine.scheduler.limits.max_model_len
        assert stretch.until_end == min(find_plain_end(one, *ends) - len(one.output_token_ids) for one in order)
        who = [(one.request_id, len(one.prompt_token_ids) if one in begin else 1) for one in order]
        steps.extend((start, executor.merged_adapter(), who) for start in starts)
        return carry_out(stretch, starts, *more, **options)

    executor.submit = recorded_submit  # type: ignore[method-assign, assignment]
    advance.carry_out = recorded_stretch  # type: ignore[method-assign]
    return steps


def engine_config(rng: random.Random) -> EngineConfig:
    policy = rng.choice(["fcfs", "merge", "credit", "credit", "credit"])
    config: dict[str, Any] = {
        "policy": policy,
        "depth": rng.choice([0, 0, 0, 1]),
        "max_model_len": 200,
        "max_num_seqs": rng.choice([2, 4, 8]),
        "max_loras": rng.choice([1, 2, 4]),
        "max_num_batched_tokens": rng.choice([16, 64, 256]),
        "enable_prefix_caching": rng.random() < 0.1,
        "num_host_blocks": rng.choice([0, 0, 30]),
    }
    extra = rng.choice(["none", "none", "minority", "artifact", "bound"])
    if extra == "minority" and policy == "credit":
        config["merged_minority"] = True
    elif extra == "artifact":
        config["policy_profile"] = "artifact"
    elif extra == "bound":
        config["max_adapter_wait"] = 0.3
    return EngineConfig("simulated", **config)


def trigger_settings(rng: random.Random) -> TriggerSettings:
    """What plans often, what plans rarely, and what plans for little."""
    return TriggerSettings(
        period=rng.choice([0.2, 0.5, 10.0]),
        pause=rng.choice([0.0, 0.1, 0.1, 1.0]),
        kv_share=rng.choice([0.5, 0.9]),
        imbalance=rng.choice([0.1, 1.0]),
        starving=rng.choice([0.1, 5.0]),
        only_period=rng.random() < 0.1,
    )


def workload(seed: int, sizes: Sequence[int]) -> tuple[SimCluster, list[Coming]]:
    """Up to four replicas, blocks and slots that are often too few, and arrivals all at once or seconds apart."""
    rng = random.Random(seed)
    config = engine_config(rng)
    prior = rng.choice([CostModel, CostModel.paper, CostModel.paper])
    blocks, held, host = rng.choice([400, 400, 24]), rng.randint(0, 1), rng.choice([0.0, 1e-3])
    # Of their own, so that the rest of a seed's workload stays what it is.
    own = random.Random(f"context {seed}")
    token, context = own.choice([0.0, 0.0, 1e-6, 3e-4]), own.choice([0.0, 40.5])
    hardware = SimHardware(
        config, CostModel.paper(), prior, blocks, 1 << 20, held, host, context_token=token, context=context
    )
    names = [f"a{i}" for i in range(rng.randint(1, 6))]
    num_bytes = 1 << rng.choice([20, 28])
    specs = {name: AdapterSpec(name, f"{i:064d}", name, {"q": 8}, num_bytes) for i, name in enumerate(names)}
    kind = rng.choice(["rr", "proactive", "dlora", "dlora"])
    triggers = trigger_settings(rng)
    options = OrchestratorOptions(config.max_num_seqs, 1 << 16, 1, migration=kind, triggers=triggers)
    cluster = SimCluster([hardware] * rng.randint(1, 4), specs, options, message_seconds=rng.choice([2e-4, 5e-3]))
    seconds, hot, together = rng.choice([0.5, 3.0, 15.0]), rng.choice([0.2, 0.8]), rng.random() < 0.2
    coming = []
    for _ in range(rng.choice(sizes)):
        adapter = None if rng.random() < 0.1 else "a0" if rng.random() < hot else rng.choice(names)
        time = seconds * rng.random()
        coming.append(Coming(round(time) if together else time, adapter, rng.randint(1, 90), rng.randint(1, 60)))
    return cluster, coming


def run(cluster: SimCluster, coming: list[Coming], *, advance: bool) -> tuple[Recorded, list[Outcome]]:
    simulator = Recorded(cluster, advance=advance)
    return simulator, simulator.run(coming)


def state(replica: SimReplica) -> dict[str, Any]:
    engine = replica.engine
    engine.scheduler.blocks.check()
    engine.scheduler.adapters.check()
    return {
        "steps": (engine.num_steps, engine.num_merged_steps, engine.num_switches, engine.switch_seconds),
        "stats": engine.stats(),
        "policy": engine.scheduler.policy.report(),
        "credits": engine.scheduler.policy.credits,
        "costs": engine.cost.to_dict(),
    }


@cache
def check(seed: int, sizes: Sequence[int]) -> Counter[str]:
    """What happened: "steps" in all, "together" those that were taken with others, and ``INTERRUPTIONS``."""
    cluster, coming = workload(seed, sizes)
    singly, expected = run(cluster, coming, advance=False)
    at_once, outcomes = run(cluster, coming, advance=True)
    assert outcomes == expected
    assert at_once.steps == singly.steps
    assert list(map(state, at_once.replicas)) == list(map(state, singly.replicas))
    assert at_once.core.migration.view() == singly.core.migration.view()
    for replica_id in range(len(singly.replicas)):
        ours, theirs = (one.core.replicas[replica_id] for one in (at_once, singly))
        assert (ours.stats, ours.detail, ours.last_heard) == (theirs.stats, theirs.detail, theirs.last_heard)
        assert (ours.num_sent, ours.num_taken) == (theirs.num_sent, theirs.num_taken)
    assert at_once.details == singly.details
    return counts(at_once)


def counts(simulator: Recorded) -> Counter[str]:
    view = simulator.core.migration.view()
    seen = Counter(steps=sum(map(len, simulator.steps)), moves=sum(view.moves.values()) if view else 0)
    for replica in simulator.replicas:
        seen["together"] += replica.run.num_steps
        seen["switches"] += replica.engine.num_switches
        seen["preemptions"] += replica.engine.scheduler.num_preemptions
        seen["evictions"] += replica.engine.scheduler.adapters.evictions
    return seen


@pytest.mark.parametrize("first", some_of(FIRSTS))
def test_many_steps_at_once_are_the_same_steps(first: int) -> None:
    seen = sum((check(seed, SMALL) for seed in range(first, first + 20)), Counter[str]())
    assert 0.1 * seen["steps"] < seen["together"] < seen["steps"]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1000 + WORKLOADS, 20))
def test_so_they_are_under_more_requests(first: int) -> None:
    for seed in range(first, first + 20):
        check(seed, LARGE)


def test_the_workloads_have_what_interrupts_equal_steps() -> None:
    """Or the tests above, which have run them already, would say little."""
    fast = [seed for first in FIRSTS[::2] for seed in range(first, first + 20)]
    seen = sum((check(seed, SMALL) for seed in fast), Counter[str]())
    assert min(seen[each] for each in INTERRUPTIONS) >= 5, seen


class Interrupted(Recorded):
    """Every third round takes its step by itself, as where something is to be told or copied."""

    def _set_up(self) -> None:
        super()._set_up()
        rounds = itertools.count()
        for replica in self.replicas:
            replica.run.begin = partial(self._begin, replica.run.begin, rounds)  # type: ignore[method-assign]

    def _begin(self, begin: Callable[..., Any], rounds: Iterator[int], *asked: Any) -> Any:
        return begin(*asked) if next(rounds) % 3 else None


@pytest.mark.parametrize("seed", range(20))
def test_steps_by_themselves_between_equal_ones_end_nobody_later(seed: int) -> None:
    """A request that was let draw more than it asked for would never end: nothing is left to compute for it."""
    cluster, coming = workload(seed, SMALL)
    at_once = Interrupted(cluster, advance=True)
    assert at_once.run(coming) == run(cluster, coming, advance=False)[1]


def test_first_tokens_and_ends_of_one_step_are_told_in_the_order_of_its_batch() -> None:
    check(1013, LARGE)  # Seed 1004 has it too.


def test_a_lone_request_is_a_few_events() -> None:
    """One step for its prompt, and one run of equal ones for each second and the end, all by the short way."""
    cluster, _ = workload(0, SMALL)
    [hardware, *_] = cluster.hardware
    config = EngineConfig("simulated", max_model_len=4096, enable_prefix_caching=False, policy="fcfs", depth=0)
    cluster = replace(cluster, hardware=[replace(hardware, config=config, num_blocks=400, prior=CostModel.paper)])
    simulator, [outcome] = run(cluster, [Coming(0.5, None, 8, 1000)], advance=True)
    assert outcome.tokens == 1000 and outcome.last is not None
    assert [replica.run.num_steps for replica in simulator.replicas] == [1000]
    # 64 steps at most are planned at once, and once a second one has details.
    assert simulator.replicas[0].run.number <= 999 / 64 + (outcome.last - 0.5) + 3
