"""Classes of requests: nobody lost, nobody twice, and room promised for the largest."""

from __future__ import annotations

import random
import time
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from peft_dist.placement.aggregation import RequestLoad, aggregate, expected_tokens, pick
from peft_dist.placement.planning import greedy_plan, plans
from peft_dist.placement.solving import solve
from peft_dist.placement.types import ClusterView, Move, PlanError
from tests.placement.cases import random_view

requests = st.lists(
    st.builds(
        RequestLoad,
        request_id=st.just(""),
        replica=st.sampled_from([10, 11]),
        adapter=st.sampled_from(["a0", ""]),
        prefill_tokens=st.integers(0, 5000),
        decode_tokens=st.floats(0, 2000),
        context_tokens=st.sampled_from([0, 0, 10, 3000]),
        kv_blocks=st.integers(0, 300),
        kv_bytes=st.integers(0, 10**9),
    ),
    max_size=60,
)


def named(found: list[RequestLoad]) -> list[RequestLoad]:
    return [RequestLoad(f"r{i}", *(getattr(r, f) for f in r.__struct_fields__[1:])) for i, r in enumerate(found)]


@settings(max_examples=60, deadline=None)
@given(requests, st.sampled_from([4, 10, 1000]))
def test_classes_hold_everybody_once(found: list[RequestLoad], most: int) -> None:
    found = named(found)
    classes, members = aggregate(found, max_classes=most)
    by_id = {one.request_id: one for one in found}
    assert Counter(name for ids in members for name in ids) == Counter(by_id.keys())
    kinds = {(one.replica, one.adapter, one.context_tokens > 0) for one in found}
    assert len(classes) <= max(most, 2 * len(kinds))
    for one, ids in zip(classes, members, strict=True):
        own = [by_id[name] for name in ids]
        assert one.count == len(own)
        assert {(r.replica, r.adapter, r.context_tokens > 0) for r in own} == {
            (one.source, one.adapter, one.context_tokens > 0)
        }
        assert (one.kv_blocks, one.kv_bytes) == (max(r.kv_blocks for r in own), max(r.kv_bytes for r in own))
        assert one.decode_tokens * one.count == pytest.approx(sum(r.decode_tokens for r in own))
        assert one.prefill_tokens * one.count == pytest.approx(sum(r.prefill_tokens for r in own))


def test_members_of_a_class_are_about_alike() -> None:
    rng = random.Random(1)
    found = [RequestLoad(f"r{i}", 10, "", rng.randrange(1, 4000), rng.randrange(1, 1000)) for i in range(300)]
    by_id = {one.request_id: one.prefill_tokens + 10 * one.decode_tokens for one in found}
    classes, members = aggregate(found)
    assert 3 < len(classes) < 20
    assert all(max(map(by_id.get, ids)) <= 2 * min(map(by_id.get, ids)) + 2 for ids in members)  # type: ignore[type-var, operator]


def test_a_plan_over_classes_moves_single_requests_once() -> None:
    moved = 0
    for seed in range(40):
        view = random_view(seed)
        rng = random.Random(seed)
        ids = [r.replica_id for r in view.replicas]
        names = ["", *(a.adapter for a in view.adapters)]
        found = [
            RequestLoad(f"r{i}", ids[0], rng.choice(names), rng.randrange(50), rng.randrange(1, 80), kv_blocks=1)
            for i in range(rng.randrange(1, 30))
        ]
        classes, members = aggregate(found)
        whole = ClusterView(view.replicas, view.adapters, classes)
        end = time.monotonic() + 5
        *_, plan = plans(
            whole,
            lambda program, left, gap: solve(program, min(left, 0.5), gap),
            lambda end=end: end - time.monotonic(),
        )  # type: ignore[misc]
        chosen = pick(plan, members)
        assert len({move.request_id for move in chosen}) == len(chosen) == sum(move.count for move in plan.moves)
        by_id = {one.request_id: one for one in found}
        assert all(by_id[move.request_id].replica == move.source != move.target for move in chosen)
        for replica in view.replicas:
            coming = [by_id[m.request_id].kv_blocks for m in chosen if m.target == replica.replica_id]
            assert sum(coming) <= replica.free_kv_blocks
        moved += len(chosen)
    assert moved


def test_more_moves_than_members_are_refused() -> None:
    plan = greedy_plan(random_view(0))
    plan = type(plan)(**{f: getattr(plan, f) for f in plan.__struct_fields__} | {"moves": [Move(0, 1, 2, "", 3, "kv")]})
    with pytest.raises(PlanError, match="class 0 has 2 members"):
        pick(plan, [["a", "b"]])


def test_expected_tokens() -> None:
    assert expected_tokens(10, 10, 50.0) == 0.0
    assert expected_tokens(0, 10, 1.0) == 1.0
    # Without a limit the mean itself, however many were drawn; with one, as many as a simulation draws.
    assert expected_tokens(500, 10**6, 50.0) == pytest.approx(50.0)
    rng = random.Random(0)
    drawn = [next((n for n in range(1, 30) if rng.random() < 1 / 50), 30) for _ in range(20_000)]
    assert expected_tokens(70, 100, 50.0) == pytest.approx(sum(drawn) / len(drawn), rel=0.01)
