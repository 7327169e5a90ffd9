"""Random clusters, small enough to try every plan, and every plan tried by rules written down a second time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from peft_dist.placement.costs import ReplicaCosts
from peft_dist.placement.types import AdapterLoad, ClusterView, MigrationPlan, ReplicaLoad, RequestClass

MEAN_WEIGHT = 0.01


def random_costs(rng: random.Random) -> ReplicaCosts:
    return ReplicaCosts(
        prefill_token=rng.choice([0.001, 0.002]),
        decode_token=rng.choice([0.01, 0.01, 0.02]),
        load=(rng.choice([0.0, 0.1]), rng.choice([0.0, 0.05])),
        fetch=(0.05, rng.choice([0.0, 0.1])),
        transfer=(0.05, rng.choice([0.0, 0.001])),
        swap_block=rng.choice([0.0, 0.02]),
        move=rng.choice([0.0, 0.02]),
        merged=rng.choice([1.0, 0.5, 0.8]),
    )


def random_view(seed: int, replicas: int = 3, classes: int = 4, count: int = 4, adapters: int = 3) -> ClusterView:
    """A cluster with little room: adapters of 1 to 3 bytes, pools of a few blocks."""
    rng = random.Random(seed)
    names = [f"a{index}" for index in range(rng.randint(1, adapters))]
    number = rng.choice([2, replicas, replicas])
    return ClusterView(
        [_replica(rng, index, names) for index in range(number)],
        [AdapterLoad(name, rng.randint(1, 3), rng.random()) for name in names],
        [_requests(rng, number, names, count) for _ in range(rng.randint(1 + classes // 2, classes))],
        floor=rng.choice([0.0, 0.0, 0.3, 1.0]),
    )


def _replica(rng: random.Random, index: int, names: list[str]) -> ReplicaLoad:
    blocks = rng.randint(4, 30)
    return ReplicaLoad(
        replica_id=10 + index,
        costs=random_costs(rng),
        kv_blocks=blocks,
        free_kv_blocks=rng.randint(0, blocks) if rng.random() < 0.5 else blocks,
        adapter_bytes=rng.randint(1, 7),
        backlog=rng.choice([0.0, 0.0, 0.5]),
        device=[name for name in names if rng.random() < 0.4],
        host=[name for name in names if rng.random() < 0.5],
        pinned=[name for name in names if rng.random() < 0.1],
        accepts=rng.random() < 0.9,
        free_seats=rng.choice([None, None, 0, 1, 3]),
        merging=rng.choice(["", *names]),
        mixing=rng.choice([0.0, 0.3]),
        free_places=rng.choice([None, None, 2, 5]),
        is_reserved=rng.random() < 0.2,
    )


def _requests(rng: random.Random, replicas: int, names: list[str], count: int) -> RequestClass:
    running = rng.random() < 0.5
    return RequestClass(
        # Most on one replica, as a planner is asked when that is so.
        source=10 + (0 if rng.random() < 0.6 else rng.randrange(replicas)),
        adapter=rng.choice([*names, *names, ""]),
        count=rng.choice([0, *range(1, count + 1), count]),
        prefill_tokens=0.0 if running else rng.randint(1, 100),
        decode_tokens=rng.randint(1, 80),
        context_tokens=rng.randint(1, 200) if running else 0.0,
        kv_blocks=rng.randint(0, 4),
        kv_bytes=rng.randint(0, 200) if running else 0,
    )


def arrangements(view: ClusterView) -> Iterator[list[tuple[int, ...]]]:
    """For each class how many of its requests are on each replica, every way there is."""
    size = len(view.replicas)
    choices = [
        [split for split in itertools.product(range(one.count + 1), repeat=size) if sum(split) == one.count]
        for one in view.classes
    ]
    for chosen in itertools.product(*choices):
        yield list(chosen)


def seconds_of(view: ClusterView, arrangement: list[tuple[int, ...]]) -> list[float] | None:
    """Finishing times; None if something does not fit."""
    times = []
    for number, replica in enumerate(view.replicas):
        here = [(one, split[number]) for one, split in zip(view.classes, arrangement, strict=True) if split[number]]
        coming = [(one, count) for one, count in here if one.source != replica.replica_id]
        if coming and not replica.accepts:
            return None
        if replica.is_reserved and any(one.adapter != (replica.merging or None) for one, _ in coming):
            return None
        if replica.free_places is not None and sum(count for _, count in coming) > replica.free_places:
            return None
        if sum(count * one.kv_blocks for one, count in coming) > replica.free_kv_blocks:
            return None
        running = sum(count for one, count in coming if one.context_tokens)
        if replica.free_seats is not None and running > replica.free_seats:
            return None
        if not _adapters_fit(view, number, {one.adapter for one, _ in here}):
            return None
        times.append(_time(view, number, here))
    return times


def _adapters_fit(view: ClusterView, number: int, used: set[str]) -> bool:
    replica = view.replicas[number]
    sizes = {one.adapter: one.num_bytes for one in view.adapters} | {"": 0}
    own = {one.adapter for one in view.classes if one.source == replica.replica_id and one.count}
    before = sum(sizes[adapter] for adapter in own | set(replica.pinned))
    return sum(sizes[adapter] for adapter in used | set(replica.pinned)) <= max(replica.adapter_bytes, before)


def _time(view: ClusterView, number: int, here: list[tuple[RequestClass, int]]) -> float:
    replica = view.replicas[number]
    costs = replica.costs
    total = replica.backlog
    for one, count in here:
        speed = costs.merged if replica.merging and one.adapter == replica.merging else 1.0
        work = one.prefill_tokens * costs.prefill_token + one.decode_tokens * costs.decode_token * speed
        if one.source != replica.replica_id:
            again = one.context_tokens * costs.prefill_token
            work += costs.move + (min(again, costs.transfer[0] + costs.transfer[1] * one.kv_bytes) if again else 0.0)
        total += count * work
    sizes = {one.adapter: one.num_bytes for one in view.adapters}
    for adapter in {one.adapter for one, _ in here} - {"", *replica.device}:
        total += costs.load[0] + costs.load[1] * sizes[adapter]
        if adapter not in replica.host:
            total += costs.fetch[0] + costs.fetch[1] * sizes[adapter]
    if replica.merging:
        total += replica.mixing * len({one.adapter for one, _ in here} - {replica.merging})
    demand = sum(count * one.kv_blocks for one, count in here)
    return total + costs.swap_block * max(0, demand - replica.kv_blocks)


def objective(times: list[float], floor: float = 0.0) -> float:
    return max(*times, floor) + MEAN_WEIGHT * sum(times) / len(times)


def best_objective(view: ClusterView, latest: float) -> float:
    """The least objective of all plans that fit and whose makespan is at most ``latest``."""
    all_times = (seconds_of(view, arrangement) for arrangement in arrangements(view))
    fitting = [times for times in all_times if times is not None and max(*times, view.floor) <= latest + 1e-9]
    return min(objective(times, view.floor) for times in fitting)


def arrangement_of(view: ClusterView, plan: MigrationPlan) -> list[tuple[int, ...]]:
    """Where a plan leaves everybody, from its moves."""
    numbers = {replica.replica_id: index for index, replica in enumerate(view.replicas)}
    found = []
    for index, one in enumerate(view.classes):
        split = [0] * len(view.replicas)
        split[numbers[one.source]] = one.count
        for move in plan.moves:
            if move.index == index:
                assert (move.source, move.adapter) == (one.source, one.adapter) and move.count > 0
                split[numbers[move.source]] -= move.count
                split[numbers[move.target]] += move.count
        assert min(split) >= 0 and sum(split) == one.count
        found.append(tuple(split))
    return found
