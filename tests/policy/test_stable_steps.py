"""What a policy says will not change does not, and booking it at once is booking it step by step."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import msgspec
from hypothesis import example, given
from hypothesis import strategies as st

from peft_dist.core.cost_model import CostModel
from peft_dist.policy.batching import BatchingPolicy, Choice, QueueState
from peft_dist.policy.factory import make_policy
from peft_dist.policy.settings import PolicySettings
from tests.policy.queues import queue
from tests.thorough import examples

SECONDS = 0.027
PROFILES = {
    "ours": PolicySettings(),
    "short": PolicySettings(max_adapter_wait=0.5),
    "minority": PolicySettings(merged_minority=True),
    "artifact": PolicySettings.artifact(),
    "indebted": replace(PolicySettings(), max_debt=0.5, credit_gap=0.2),
}


def books(policy: BatchingPolicy) -> tuple[Any, ...]:
    tracker = policy.overtaking  # type: ignore[attr-defined]
    return policy.report(), policy.credits, tracker.longest, tracker.longest_ever


def members(choice: Choice) -> tuple[str | None, list[str], str, frozenset[str]]:
    return choice.merged_adapter, [c.request_id for c in choice.candidates], choice.reason, choice.urgent


def all_of_them(adapter: str) -> bool:
    return True


def only_b(adapter: str) -> bool:
    return adapter == "b"


def step(policy: BatchingPolicy, state: QueueState) -> Choice:
    choice = policy.choose(state)
    policy.ran(state, choice, [c.request_id for c in choice.candidates])
    return choice


@examples(12, 60)
@given(
    st.sampled_from(["fcfs", "merge", "credit", "credit"]),
    st.sampled_from(sorted(PROFILES)),
    st.lists(st.tuples(st.text("aaabc-", min_size=1, max_size=8), st.integers(1, 12)), min_size=1, max_size=8),
    st.integers(1, 5),
)
def test_stable_steps_are_the_same_steps(name: str, profile: str, history: list[tuple[str, int]], seats: int) -> None:
    """Queues come one after another, each for some steps; before every one, a copy books what is stable at once."""
    policy = make_policy(name, "dlora", PROFILES[profile], CostModel.paper())
    now, merged = 0.0, None
    for letters, times in history:
        for _ in range(times):
            state = queue(letters, merged=merged, now=now, seats=seats)
            at_once = copy.deepcopy(policy)
            choice = at_once.choose(state)
            stable = int(min(at_once.stable_steps(SECONDS), 40))
            starts = [now + SECONDS * i for i in range(stable + 1)]
            if choice.merged_adapter == merged:
                at_once.repeat([c.request_id for c in choice.candidates], starts)
                singly = copy.deepcopy(policy)
                answers = [step(singly, msgspec.structs.replace(state, now=start)) for start in starts]
                assert [members(answer) for answer in answers] == [members(choice)] * len(starts)
                assert books(at_once) == books(singly)
                after = msgspec.structs.replace(state, now=starts[-1] + SECONDS)
                assert members(at_once.choose(after)) == members(singly.choose(after))
            merged = step(policy, state).merged_adapter
            now += SECONDS


@given(st.sampled_from(["fcfs", "merge", "credit"]))
def test_nothing_is_stable_while_costs_are_learnt(name: str) -> None:
    policy = make_policy(name, "dlora", PolicySettings(), CostModel())
    policy.choose(queue("aab"))
    assert policy.stable_steps(SECONDS) == 0


def test_a_batch_with_a_seat_for_everybody_is_stable_for_ever() -> None:
    policy = make_policy("credit", "dlora", PolicySettings(), CostModel.paper())
    for i in range(2):
        step(policy, queue("abc-", now=i * SECONDS))
    policy.choose(queue("abc-", now=2 * SECONDS))
    assert policy.stable_steps(SECONDS) == float("inf")


def test_who_waits_becomes_urgent_in_time() -> None:
    """An older request is overtaken by the merged adapter's: for as long as the bound, or its credit, allows."""
    settings = PolicySettings(max_adapter_wait=1.0)
    policy = make_policy("credit", "dlora", settings, CostModel.paper())
    state = queue("baaaaaaaa", merged="a", seats=8)
    for i in range(3):
        step(policy, msgspec.structs.replace(state, now=i * SECONDS))
    choice = policy.choose(msgspec.structs.replace(state, now=3 * SECONDS))
    assert choice.merged_adapter == "a" and "b0" not in members(choice)[1]
    assert 0 < policy.stable_steps(SECONDS) < 1.0 / SECONDS - 3


@examples(25, 150)
@example("credit", "ours", [("acac", 5, None, False)], 6)
@given(
    st.sampled_from(["fcfs", "merge", "credit", "credit"]),
    st.sampled_from(sorted(PROFILES)),
    st.lists(
        st.tuples(
            st.text("aaabc-", min_size=1, max_size=8),
            st.integers(1, 5),
            st.sampled_from([None, "a", "b"]),
            st.booleans(),
        ),
        min_size=1,
        max_size=10,
    ),
    st.integers(1, 6),
)
def test_what_is_kept_of_a_queue_that_is_the_same_changes_nothing(
    name: str, profile: str, stretches: list[tuple[str, int, str | None, bool]], seats: int
) -> None:
    """The same list again, and an equal one that nobody has seen."""
    kept, fresh = (make_policy(name, settings=PROFILES[profile], cost_model=CostModel.paper()) for _ in range(2))
    now = 0.0
    for letters, count, held, may_merge in stretches:
        merged = held if held is not None and held in letters else None
        state = queue(letters, seats=seats)
        for number in range(count):
            now += SECONDS
            mergeable = all_of_them if may_merge or number < 2 else only_b
            state = msgspec.structs.replace(state, now=now, merged_adapter=merged, mergeable=mergeable)
            choices = [step(kept, state), step(fresh, msgspec.structs.replace(state, candidates=[*state.candidates]))]
            assert members(choices[0]) == members(choices[1])
            assert books(kept) == books(fresh)
            # As in an engine that does what was chosen.
            merged = choices[0].merged_adapter
