"""The cluster as planners see it, made from the orchestrator's tables and the replicas' reports."""

from __future__ import annotations

import math
from collections.abc import Iterable, Set

import msgspec

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.step_costs import StepCosts
from peft_dist.orchestrator.adapter_calls import AdapterCalls
from peft_dist.orchestrator.adapters import AdapterRegistry
from peft_dist.orchestrator.records import Replica
from peft_dist.orchestrator.replicas import ReplicaTable
from peft_dist.orchestrator.requests import RequestTable
from peft_dist.placement.costs import ReplicaCosts
from peft_dist.placement.rates import ArrivalRates
from peft_dist.placement.triggers import Trigger, TriggerSettings
from peft_dist.placement.types import BASE, AdapterLoad, ClusterView, ReplicaLoad, RequestClass
from peft_dist.policy.dispatch import Backlog
from peft_dist.policy.merging import merged_share, slowdown

# Part of the mean number of requests with which a replica has far fewer than others.
FAR_FEWER = 0.5


class Views:
    """Makes ``ClusterView``s of the replicas that take requests."""

    def __init__(
        self,
        requests: RequestTable,
        replicas: ReplicaTable,
        registry: AdapterRegistry,
        calls: AdapterCalls,
        rates: ArrivalRates,
        max_num_seqs: int,
        triggers: TriggerSettings,
    ) -> None:
        self._triggers = triggers
        self._requests = requests
        self._replicas = replicas
        self._registry = registry
        self._calls = calls
        self._rates = rates
        self._max_num_seqs = max_num_seqs

    def adapters(self, now: float, used: Iterable[AdapterSpec] = ()) -> list[AdapterLoad]:
        """Every content that has a name, and those ``used`` besides, once each; the longest named first."""
        sizes = {spec.content_hash: spec.num_bytes for spec in [*self._registry.specs(), *used]}
        rate, work = self._rates.rate, self._rates.work
        return [AdapterLoad(content, size, rate(content, now), work(content)) for content, size in sizes.items()]

    def contents(self) -> tuple[str, ...]:
        """Every content that has a name."""
        return tuple(spec.content_hash for spec in self._registry.specs())

    def placing(self, adapters: list[AdapterLoad], *, coming: bool = False) -> ClusterView:
        """What placements are found for: without requests.

        ``coming``: With replicas that are drained, or will be started again.
        """
        replicas = self._ready()
        if coming:
            replicas = [r for r in self._replicas.all() if r.model and (r.is_alive or r.will_come)]
        return ClusterView(self._loads(replicas, adapters), adapters, [])

    def loading(self, adapters: list[AdapterLoad]) -> ClusterView:
        """What adapters are loaded by: those that requests use count as pinned."""
        replicas = self._ready()
        return ClusterView(self._loads(replicas, adapters, keep_used=True), adapters, [])

    def planning(self, adapters: list[AdapterLoad], classes: list[RequestClass]) -> ClusterView:
        """What requests are moved by."""
        replicas = self._ready()
        numbers = [self._requests.backlog(replica.replica_id).num_sequences for replica in replicas]
        mean = sum(numbers) / max(len(numbers), 1)
        pairs = zip(replicas, self._loads(replicas, adapters), strict=True)
        known = {one.adapter for one in adapters}
        loads = [self._with_seats(replica, load, mean, known) for replica, load in pairs]
        return ClusterView(loads, adapters, classes, self._floor(replicas))

    def chance(self) -> Trigger | None:
        """What moves could gain though no replica is late: seats that are free while others wait for one, or an adapter
        that could be merged if requests of others were elsewhere."""
        replicas = self._ready()
        if self._has_idle_seats(replicas):
            return "seats"
        return "mixed" if any(self._merging(replica)[1] and self._others(replica) for replica in replicas) else None

    def summary(self) -> ClusterView:
        """What triggers are judged by: one class for all requests of a replica, and no adapters. Cheap."""
        replicas = self._ready()
        classes = [one for one in map(self._everything, replicas) if one.count]
        return ClusterView(self._loads(replicas, []), [], classes)

    def _ready(self) -> list[Replica]:
        return [replica for replica in self._replicas.ready() if replica.model is not None]

    def _costs(self, replicas: list[Replica]) -> dict[int, ReplicaCosts]:
        """For full decode steps of what each would run if all had the same."""
        num_base, adapters = self._usual_step(replicas)
        known = next((replica.costs for replica in replicas if replica.costs is not None), StepCosts())
        # Blocks of one size, or of one that nobody knows, are no proof of one layout: moves are checked again.
        sizes = {replica.model.kv_size for replica in replicas if replica.model}
        found = {}
        for replica in replicas:
            block_size = replica.model.block_size if replica.model else 1
            costs = replica.costs or known
            transfer = costs.transfer if len(sizes) == 1 and all(size for size, _ in sizes) else None
            found[replica.replica_id] = ReplicaCosts.of(costs, num_base, adapters, block_size, transfer)
        return found

    def _with_seats(self, replica: Replica, load: ReplicaLoad, mean: float, known: Set[str]) -> ReplicaLoad:
        """``mean``: Requests of a replica. Where all have queues they are as even as dispatch makes them: whoever moves
        between them waits again. Beyond its seats only a replica with far fewer gets some, such as a new one."""
        number, seats = self._requests.backlog(replica.replica_id).num_sequences, self._seats(replica)
        places = max(seats, math.ceil(mean)) if number <= FAR_FEWER * mean else seats
        merging, mixing = self._merging(replica)
        if merging not in known:  # It has lost its name since the requests were looked at.
            merging, mixing = "", 0.0
        return msgspec.structs.replace(
            load,
            free_seats=max(0, seats - number),
            free_places=max(0, places - number),
            merging=merging,
            mixing=mixing,
            # A few requests are no reason to keep the other seats free.
            is_reserved=bool(merging) and number >= seats / 2,
        )

    def _has_idle_seats(self, replicas: list[Replica]) -> bool:
        spare = [self._seats(one) - self._requests.backlog(one.replica_id).num_sequences for one in replicas]
        return bool(spare) and min(spare) < 0 < max(spare)

    def _seats(self, replica: Replica) -> int:
        """Sequences that run at once: where the blocks do not last for all seats, as many as of those that run."""
        stats = replica.stats
        used = stats.num_blocks - stats.num_free_blocks
        if not stats.num_running or used <= 0:
            return self._max_num_seqs
        return max(1, min(self._max_num_seqs, stats.num_blocks * stats.num_running // used))

    def _floor(self, replicas: list[Replica]) -> float:
        """While a replica has seats for those that wait elsewhere, what a request takes by itself; else what is no
        imbalance: whatever moves then waits again."""
        backlogs = [self._requests.backlog(replica.replica_id) for replica in replicas]
        costs = self._costs(replicas)
        speeds = [self._speed(replica) for replica in replicas]
        left = self._mean_left(backlogs)
        alone = [left * (replica.costs or StepCosts()).decode_seconds(1, {}) for replica in replicas]
        if not backlogs or self._has_idle_seats(replicas):
            return max(alone, default=0.0)
        times = [
            max(backlog.prefill_tokens, 0) * cost.prefill_token
            + max(backlog.output_tokens, 0.0) * cost.decode_token * speed
            for backlog, cost, speed in zip(backlogs, costs.values(), speeds, strict=True)
        ]
        mean = sum(times) / len(times)
        return max(*alone, mean + max(self._triggers.imbalance, self._triggers.imbalance_share * mean))

    @staticmethod
    def _mean_left(backlogs: list[Backlog]) -> float:
        """Tokens that a sequence still has to draw, on average."""
        total = sum(backlog.num_sequences for backlog in backlogs)
        return max(sum(backlog.output_tokens for backlog in backlogs), 0.0) / total if total else 0.0

    def _others(self, replica: Replica) -> int:
        """Adapters beside the one that leads, the base as one of them."""
        backlog = self._requests.backlog(replica.replica_id)
        with_adapter = sum(number for number, _ in backlog.adapters.values())
        return len(backlog.adapters) - 1 + (backlog.num_sequences > with_adapter)

    def _merging(self, replica: Replica) -> tuple[str, float]:
        """The adapter that a replica runs merged, or would run so if others' requests were elsewhere; and what each of
        these adapters costs it, in seconds. ("", 0) where no adapter has enough of the requests."""
        backlog, costs = self._requests.backlog(replica.replica_id), replica.costs
        if costs is None or costs.switch is None or not backlog.adapters:
            return "", 0.0
        adapter, (leading, rank_rows) = max(backlog.adapters.items(), key=lambda item: item[1][0])
        total, seats, step, ratio = *self._seated(backlog), *self._step(backlog, costs)
        left = self._mean_left([backlog])
        if merged_share(leading / total, ratio) <= 0 or (1 - ratio) * step * left <= costs.switch_seconds(rank_rows):
            return "", 0.0
        others = self._others(replica)
        now = slowdown(leading, total, seats, ratio) if others else slowdown(total, total + 1, seats, ratio)
        return adapter, max(now - ratio, 0.0) * step * left / max(others, 1)

    def _speed(self, replica: Replica) -> float:
        """Seconds of a replica's decode steps, as a part of what they take unmerged."""
        backlog, costs = self._requests.backlog(replica.replica_id), replica.costs
        if costs is None or costs.switch is None or not self._merging(replica)[0]:
            return 1.0
        return slowdown(backlog.leading, *self._seated(backlog), self._step(backlog, costs)[1])

    def _seated(self, backlog: Backlog) -> tuple[int, int]:
        return backlog.num_sequences, self._max_num_seqs

    def _step(self, backlog: Backlog, costs: StepCosts) -> tuple[float, float]:
        """Seconds of an unmerged step of what a replica has, and those of a merged one as a part of them."""
        total, seats = self._seated(backlog)
        num_base = total - sum(number for number, _ in backlog.adapters.values())
        step = costs.decode_seconds(num_base, backlog.adapters, min(1.0, seats / total))
        return step, costs.merged_ratio(min(total, seats), step)

    def _usual_step(self, replicas: list[Replica]) -> tuple[int, dict[str, tuple[int, int]]]:
        """Sequences of the base, and those and the rank rows of each adapter, in a full step of what these replicas
        have: with seats free a request takes no longer beside others, so that a partly filled one says too much."""
        backlogs = [self._requests.backlog(replica.replica_id) for replica in replicas]
        total = sum(backlog.num_sequences for backlog in backlogs)
        batch = self._max_num_seqs
        used = [entry for backlog in backlogs for entry in backlog.adapters.values()]
        sequences = sum(number for number, _ in used)
        if not sequences:
            return batch, {}
        rank_rows = round(sum(number * rows for number, rows in used) / sequences)
        with_adapter = max(1, round(batch * sequences / total))
        distinct = min(max(1, round(len(used) / len(replicas))), with_adapter)
        shared, more = divmod(with_adapter, distinct)
        return batch - with_adapter, {str(i): (shared + (i < more), rank_rows) for i in range(distinct)}

    def _loads(
        self, replicas: list[Replica], adapters: list[AdapterLoad], *, keep_used: bool = False
    ) -> list[ReplicaLoad]:
        known = {one.adapter for one in adapters}
        names = self._registry.pinned
        pinned = {spec.content_hash for spec in self._registry.specs() if spec.name in names} if names else set()
        costs, total_bytes = self._costs(replicas), sum(one.num_bytes for one in adapters)
        loads = []
        for replica in replicas:
            blocks, free = _kv_blocks(replica)
            kept = {content for content in pinned if self._calls.holds(replica, content)}
            if keep_used:
                kept.update(self._requests.backlog(replica.replica_id).adapters)
            loads.append(
                ReplicaLoad(
                    replica_id=replica.replica_id,
                    costs=costs[replica.replica_id],
                    kv_blocks=blocks,
                    free_kv_blocks=free,
                    adapter_bytes=_adapter_room(replica, len(adapters), total_bytes),
                    device=[content for content in replica.stats.resident_adapters if content in known],
                    host=sorted(replica.on_host & known),
                    pinned=sorted(kept & known),
                )
            )
        return loads

    def _everything(self, replica: Replica) -> RequestClass:
        """All that a replica has to do, as one class. Sums of floats drift: none may fall below 0."""
        backlog = self._requests.backlog(replica.replica_id)
        count = max(backlog.num_sequences, 1)
        blocks, free = _kv_blocks(replica)
        block_size = replica.model.block_size if replica.model else 1
        demand = blocks - free + backlog.prefill_tokens / block_size
        return RequestClass(
            source=replica.replica_id,
            adapter=BASE,
            count=backlog.num_sequences,
            prefill_tokens=max(backlog.prefill_tokens / count, 0.0),
            # As many as take as long unmerged.
            decode_tokens=max(self._speed(replica) * backlog.output_tokens / count, 0.0),
            kv_blocks=math.ceil(demand / count),
        )


def _kv_blocks(replica: Replica) -> tuple[int, int]:
    """Blocks of a replica and those that are free; all of them until it has reported."""
    stats = replica.stats
    if stats.num_blocks:
        return stats.num_blocks, stats.num_free_blocks
    blocks = replica.model.num_blocks if replica.model else 0
    return blocks, blocks


def _adapter_room(replica: Replica, num_adapters: int, total: int) -> int:
    """Bytes for adapters: as many of the mean size as there are slots, but no more than the device has memory for."""
    model = replica.model
    if model is None or not num_adapters or not model.max_loras:
        return total
    slots = model.max_loras * total // num_adapters
    return min(slots, model.adapter_bytes) if model.adapter_bytes else slots
