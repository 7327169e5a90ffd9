"""What a replica's work is taken to cost before it has done any."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

from peft_dist.core.messages import AddRequest, Progress, Ready, ReplicaDetail, ReplicaStats
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.step_costs import StepCosts
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from tests.worker.fake_replica import fake_model

NAMES = itertools.count()
USUAL = StepCosts()
SLOW = StepCosts(step=tuple(50 * each for each in USUAL.step))


def detail(core: Orchestrator, replica_id: int, steps: int, costs: StepCosts, now: float = 1.0) -> None:
    said = Progress(sequences=[], stats=ReplicaStats(), detail=ReplicaDetail(num_steps=steps, costs=costs))
    core.observe(replica_id, core.replicas[replica_id].epoch, said, now)


def start(core: Orchestrator, replica_id: int, costs: StepCosts) -> None:
    epoch = core.add_replica(replica_id, 0.0).epoch
    core.observe(replica_id, epoch, Ready(model=fake_model(), pid=1, costs=costs), 0.0)


def ask(core: Orchestrator, count: int) -> Counter[int]:
    """How many requests each replica gets."""
    found: Counter[int] = Counter()
    for _ in range(count):
        name = f"r{next(NAMES)}"
        [out] = core.submit(NewRequest(name, [1, 2, 3], SamplingParams(max_tokens=8)), 0.0)
        assert isinstance(out.command, AddRequest)
        found[out.replica_id] += 1
    return found


def test_a_new_replica_gets_its_share_whatever_it_guessed_at_its_start() -> None:
    """One that was started beside busy ones guessed so high that it got none of 200 requests, and so never measured."""
    core = Orchestrator(OrchestratorOptions(64, 4096, seed=0))
    start(core, 0, USUAL)
    detail(core, 0, 1000, USUAL)
    start(core, 1, SLOW)
    assert ask(core, 40) == {0: 20, 1: 20}
    detail(core, 1, 3, SLOW)
    assert ask(core, 40) == {0: 20, 1: 20}
    detail(core, 1, 100, SLOW)
    assert ask(core, 40)[0] > 30, "what it has measured counts"


def test_the_least_guess_is_believed_of_all_until_somebody_has_measured() -> None:
    core = Orchestrator(OrchestratorOptions(64, 4096, seed=0))
    for replica_id, costs in enumerate((SLOW, USUAL, SLOW)):
        start(core, replica_id, costs)
    assert [core.replicas[replica_id].costs for replica_id in range(3)] == [USUAL] * 3
    detail(core, 0, 3, SLOW)
    assert core.replicas[0].costs == USUAL
    detail(core, 2, 100, SLOW)
    assert [core.replicas[replica_id].costs for replica_id in range(3)] == [SLOW] * 3


def test_who_has_measured_first_is_believed_of_those_that_have_not() -> None:
    core = Orchestrator(OrchestratorOptions(64, 4096, seed=0))
    start(core, 0, SLOW)
    start(core, 1, USUAL)
    assert ask(core, 20) == {0: 10, 1: 10}, "all have guessed: one of 200 requests at once got all of them"
    detail(core, 1, 100, USUAL)
    assert core.replicas[0].costs == USUAL
    assert ask(core, 40)[0] >= 20


def test_what_was_measured_long_ago_is_not_held_against_a_replica() -> None:
    """On a busy machine one replica measured high, got nothing from then on, and so never measured again."""
    core = Orchestrator(OrchestratorOptions(64, 4096, seed=0))
    for replica_id, costs in enumerate((USUAL, SLOW)):
        start(core, replica_id, costs)
        detail(core, replica_id, 100, costs)
    assert ask(core, 40)[0] > 30
    detail(core, 1, 110, SLOW, now=8.0)
    detail(core, 0, 1000, USUAL, now=8.0)
    assert core.replicas[1].costs == SLOW, "it was measured a moment ago"
    detail(core, 1, 120, SLOW, now=16.0)
    detail(core, 0, 2000, USUAL, now=16.0)
    assert core.replicas[1].costs == USUAL, "of some steps since nobody is sure"
    detail(core, 1, 200, SLOW, now=17.0)
    assert core.replicas[1].costs == SLOW, "it has measured again"


def test_when_all_have_been_idle_the_least_is_believed_of_all_alike() -> None:
    core = Orchestrator(OrchestratorOptions(64, 4096, seed=0))
    for replica_id, costs in enumerate((SLOW, USUAL)):
        start(core, replica_id, costs)
        detail(core, replica_id, 100, costs)
    detail(core, 0, 100, SLOW, now=30.0)
    assert ask(core, 40) == {0: 20, 1: 20}


def test_costs_of_another_device_are_nobody_s() -> None:
    core = Orchestrator(OrchestratorOptions(64, 4096, seed=0))
    for replica_id, costs in enumerate((SLOW, USUAL)):
        start(core, replica_id, costs)
        detail(core, replica_id, 100, costs)
    replica = core.replicas[0]
    assert replica.model is not None
    replica.model = dataclasses.replace(replica.model, device="cuda")
    detail(core, 0, 100, SLOW, now=30.0)
    assert replica.costs == SLOW
