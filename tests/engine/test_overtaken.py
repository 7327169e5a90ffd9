"""The bound on being overtaken, with too few KV blocks and adapter slots, in virtual time."""

from __future__ import annotations

import itertools
import random

import pytest
from bench.bench_starvation import Watch

from peft_dist.core.request import Request
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.engine.engine import Engine
from peft_dist.policy.settings import PolicySettings
from tests.engine.fake_executor import FakeExecutor
from tests.engine.test_engine import make_engine, make_request, step

STEP = 0.02
BOUND = 0.3
# What the policy expects of a step is not exactly what it takes, and a switch comes on top.
SLACK = 2 * STEP


def arrivals(seed: int, seconds: float) -> list[Request]:
    """Most for one adapter, the others for the base or one of the rest."""
    rng, now, found = random.Random(seed), 0.0, []
    while (now := now + rng.expovariate(9.0)) < seconds:
        adapter = 1 if rng.random() < 0.6 else rng.randrange(5)
        prompt = [rng.randrange(1, 90) for _ in range(rng.randrange(4, 24))]
        request = make_request(f"r{len(found)}", prompt, adapter, rng.randrange(2, 24), ignore_eos=True)
        request.arrival_time = now
        found.append(request)
    return found


def serve(engine: Engine, load: list[Request]) -> Watch:
    watch, now, pending = Watch(engine), 0.0, load[::-1]
    while pending or engine.has_work:
        while pending and pending[-1].arrival_time <= now:
            engine.add_request(pending.pop())
        if engine.has_work:
            moments = itertools.chain([now], itertools.repeat(now + STEP))
            watch.step(lambda moments=moments: next(moments))  # type: ignore[misc]
        now += STEP
    return watch


@pytest.mark.parametrize(
    ("policy", "slots", "blocks", "load_steps", "seed"),
    [
        # The first five were overtaken for up to twice the bound, either because what they waited for their adapter did
        # not count once it was there, or because the younger ones in the same batch kept their blocks.
        ("fcfs", 2, 16, 0, 2),
        ("credit", 2, 16, 0, 2),
        ("credit", 2, 16, 0, 9),
        ("credit", 3, 16, 0, 12),
        ("credit", 2, 20, 3, 10),
        ("merge", 1, 16, 0, 8),
        ("merge", 2, 16, 0, 13),
        ("merge", 2, 20, 3, 13),
    ],
)
def test_nobody_who_could_run_is_overtaken_for_longer_than_the_bound(
    policy: str, slots: int, blocks: int, load_steps: int, seed: int
) -> None:
    settings = PolicySettings(max_adapter_wait=BOUND)
    engine = make_engine(
        blocks, num_slots=slots, max_tokens=32, policy=policy, settings=settings, max_adapter_wait=BOUND
    )
    assert isinstance(engine.executor, FakeExecutor)
    engine.executor.load_delay = lambda spec: load_steps
    watch = serve(engine, arrivals(seed, 20.0))
    assert engine.scheduler.num_preemptions and engine.scheduler.adapters.evictions, "there was enough of everything"
    assert BOUND / 3 < watch.longest["overtaken"] <= BOUND + SLACK + load_steps * STEP


def test_an_urgent_request_gets_the_blocks_of_the_younger_also_in_a_batch_that_would_have_run_anyway() -> None:
    engine = make_engine(num_blocks=8, max_seqs=4, policy="fcfs", settings=PolicySettings(max_adapter_wait=0.5))
    young = [make_request(f"young{i}", [5] * 8, 0, 24, ignore_eos=True) for i in range(2)]
    for request in young:
        request.arrival_time = 1.0
        engine.add_request(request)
    for now in (1.0, 1.1, 1.2):
        step(engine, {}, now)
    old = Request("old", [9] * 20, SamplingParams(max_tokens=4, ignore_eos=True), seed=7, arrival_time=0.0)
    engine.add_request(old)
    for i in range(8):
        step(engine, {}, 1.3 + 0.1 * i)
        if old.first_scheduled is not None:
            break
    assert old.first_scheduled is not None and old.first_scheduled <= 1.3 + 0.5
