"""The artifact's rules for clusters, against its description: placement, dispatch, pairs, what moves between them."""

from __future__ import annotations

import itertools
import random

import pytest

from peft_dist.placement.artifact import BUS, FIRST_SECONDS, ArtifactSettings, ArtifactTable, batches
from peft_dist.placement.artifact_moves import MOVE, ArtifactPlanner, pair
from peft_dist.placement.costs import ReplicaCosts
from peft_dist.placement.types import AdapterLoad, ClusterView, ReplicaLoad, RequestClass

SIZE = 96 << 20
ROOM = 50 << 30


def table(adapters: int, replicas: int, extra: str = "common", *, swaps: bool = False, seed: int = 0) -> ArtifactTable:
    sizes = {f"a{index}": SIZE for index in range(adapters)}
    settings = ArtifactSettings(extra, swaps, seats=16, seed=seed)  # type: ignore[arg-type]
    return ArtifactTable(sizes, [ROOM] * replicas, settings)


def view(counts: list[dict[str, int]], blocks: list[int] | None = None, kv_blocks: int = 1000) -> ClusterView:
    """Requests by replica and adapter, of so many blocks each by replica."""
    names = sorted({name for own in counts for name in own if name})
    replicas = [ReplicaLoad(index, ReplicaCosts(), kv_blocks, kv_blocks, 1 << 40) for index in range(len(counts))]
    classes = [
        RequestClass(index, name, count, 10.0, 20.0, kv_blocks=(blocks or [1] * len(counts))[index], kv_bytes=1 << 23)
        for index, own in enumerate(counts)
        for name, count in own.items()
    ]
    return ClusterView(replicas, [AdapterLoad(name, SIZE) for name in names], classes)


@pytest.mark.parametrize(("adapters", "replicas", "each"), [(32, 8, 4), (128, 32, 4), (16, 8, 2), (8, 1, 8)])
@pytest.mark.parametrize("extra", ["common", "rotating"])
def test_every_adapter_is_placed_once_and_replicas_less_one_are_added(
    adapters: int, replicas: int, each: int, extra: str
) -> None:
    made = table(adapters, replicas, extra)
    copies = {name: len(own) for name, own in made.all_hosts().items()}
    assert sum(copies.values()) == adapters + replicas - 1
    if extra == "common":
        assert sorted(copies.values()) == [1] * (adapters - 1) + [replicas]
        assert sorted(made.slots) == [each] + [each + 1] * (replicas - 1)
    else:
        assert max(copies.values()) <= 2 and sorted(made.slots) == [each] + [each + 1] * (replicas - 1)


def test_the_common_adapter_is_drawn() -> None:
    drawn = {max(t.all_hosts(), key=lambda a, t=t: len(t.hosts(a))) for t in (table(16, 4, seed=s) for s in range(20))}
    assert len(drawn) > 5
    assert table(16, 4, seed=3).all_hosts() == table(16, 4, seed=3).all_hosts()


def test_full_batches_of_one_adapter_count_for_less() -> None:
    assert batches([], 16) == batches([15], 16) == 0
    assert batches([16], 16) == pytest.approx(0.6) and batches([8, 8], 16) == 1
    assert batches([33, 20, 15], 16) == pytest.approx(0.6 * 3 + 1)


def test_a_request_goes_to_the_host_with_the_fewest_batches_and_to_the_first_of_equals() -> None:
    made = table(4, 2, "rotating")
    both = next(name for name in made.all_hosts() if len(made.hosts(name)) == 2)
    alone = next(name for name in made.all_hosts() if len(made.hosts(name)) == 1)
    [home] = made.hosts(alone)
    assert made.choose(both, {0: {both: 15}, 1: {}}) == 0
    assert made.choose(both, {0: {both: 8, alone: 8}, 1: {both: 16}}) == 1
    assert made.choose(alone, {0: {alone: 99}, 1: {alone: 99}}) == home
    # Nobody that can has it: the replica with the fewest requests.
    assert made.choose("unknown", {0: {"": 3}, 1: {"": 2}}) == 1


def test_an_idle_adapter_that_others_have_too_may_be_put_out() -> None:
    made = table(4, 2, "rotating", swaps=True)
    double = next(name for name in made.all_hosts() if len(made.hosts(name)) == 2)
    wanted = next(name for name in made.all_hosts() if made.hosts(name) == {0})
    busy = {0: {wanted: 40}, 1: {}}
    assert made.choose(wanted, {0: {wanted: 3}, 1: {}}) == 0, "a load costs more than nothing"
    assert made.choose(wanted, {0: {wanted: 40}, 1: {double: 1}}) == 0, "it is not idle"
    assert made.choose(wanted, busy) == 1
    assert made.hosts(wanted) == {0, 1} and made.hosts(double) == {0}
    assert SIZE / BUS < 0.01


def test_replicas_are_paired_by_memory_and_then_by_number() -> None:
    assert pair(view([{"a": 10}, {"a": 10}])) is None
    assert pair(view([{"a": 5}, {"a": 10}, {}], blocks=[50, 90, 1])) == (1, 2)
    assert pair(view([{"a": 10}, {"a": 10}], blocks=[95, 95])) is None, "there is nobody with room"
    assert pair(view([{"a": 20}, {"a": 60}, {"a": 10}])) == (1, 0), "the first below the mean"
    assert pair(view([{"a": 20}, {"a": 44}, {"a": 20}])) == (1, 0)
    assert pair(view([{"a": 20}, {"a": 43}, {"a": 20}])) is None, "15 1/3 more than the mean"


def test_the_plan_is_as_good_as_any() -> None:
    """All ways to share a few requests between two, by rules written down a second time."""
    for seed in range(30):
        rng = random.Random(seed)
        made = table(6, 2, seed=seed)
        for name in made.all_hosts():
            if rng.random() < 0.7:
                made.ended(name, rng.choice([1.0, 3.0, 8.0]))
        crowd = made.on(0)[:3]
        counts = [{name: rng.randint(1, 14) for name in crowd}, {made.on(1)[0]: rng.randint(1, 3)}]
        seen = view(counts, blocks=[rng.choice([1, 40]), 1])
        both = pair(seen)
        plan = ArtifactPlanner(made)(seen)
        if both is None:
            assert plan.origin == "stay" and not plan.moves
            continue
        moved = {move.index: move.count for move in plan.moves}
        assert all(move.way == "recompute" for move in plan.moves)
        assert plan.after == pytest.approx(ends(made, seen, moved), rel=1e-3)
        options = [range(one.count + 1) for one in seen.classes]
        best = min(
            ends(made, seen, dict(enumerate(each)))
            for each in itertools.product(*options)
            if fits(made, seen, dict(enumerate(each)))
        )
        assert plan.after == pytest.approx(best, rel=2e-3)
        assert fits(made, seen, moved)


def ends(made: ArtifactTable, seen: ClusterView, moved: dict[int, int]) -> float:
    """When the last of two ends, if so many of each class are on the other one."""
    times, blocks = [0.0, 0.0], [0, 0]
    for index, one in enumerate(seen.classes):
        for replica in (0, 1):
            away = moved.get(index, 0)
            count = one.count - away if replica == one.source else away
            cost = made.seconds(one.adapter) + (0.0 if replica == one.source else MOVE)
            times[replica] += count * cost
            blocks[replica] += count * one.kv_blocks
    second = BUS / (1 << 23) * max(one.kv_blocks for one in seen.classes[:1])
    return max(t + max(0, b - 1000) / second for t, b in zip(times, blocks, strict=True))


def fits(made: ArtifactTable, seen: ClusterView, moved: dict[int, int]) -> bool:
    for replica in (0, 1):
        used = {
            one.adapter
            for index, one in enumerate(seen.classes)
            if (one.count - moved.get(index, 0) if replica == one.source else moved.get(index, 0))
        }
        if len(used) > made.slots[replica]:
            return False
    return True


def test_adapters_move_with_their_requests_and_free_slots_are_filled() -> None:
    made = table(8, 2)
    crowd = next(name for name in made.on(0) if made.hosts(name) == {0})
    plan = ArtifactPlanner(made)(view([{crowd: 60}, {}]))
    assert sum(move.count for move in plan.moves) == pytest.approx(30, abs=1)
    assert ("load", 1, crowd) in [(step.kind, step.replica, step.adapter) for step in plan.steps]
    gone = [(step.adapter, step.replica) for step in plan.steps if step.kind == "evict"]
    made.rearrange(gone, [(step.adapter, step.replica) for step in plan.steps if step.kind == "load"])
    assert made.hosts(crowd) >= {1} and all(made.hosts(name) for name in made.all_hosts())
    assert all(len(made.on(replica)) <= made.slots[replica] for replica in (0, 1))


def test_seconds_are_those_of_requests_that_ended() -> None:
    made = table(2, 1)
    assert made.seconds("a0") == FIRST_SECONDS
    made.ended("a0", 1.0)
    made.ended("a0", 2.0)
    assert made.seconds("a0") == 1.5 and made.seconds("a1") == FIRST_SECONDS
