"""The cluster as planners see it, made from the orchestrator's tables and the replicas' reports."""

from __future__ import annotations

import math
from collections.abc import Iterable

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.step_costs import StepCosts
from peft_dist.orchestrator.adapter_calls import AdapterCalls
from peft_dist.orchestrator.adapters import AdapterRegistry
from peft_dist.orchestrator.records import Replica
from peft_dist.orchestrator.replicas import ReplicaTable
from peft_dist.orchestrator.requests import RequestTable
from peft_dist.placement.costs import ReplicaCosts
from peft_dist.placement.rates import ArrivalRates
from peft_dist.placement.types import BASE, AdapterLoad, ClusterView, ReplicaLoad, RequestClass


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
    ) -> None:
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
            replicas = [r for r in self._replicas.all() if r.model and (r.is_alive or r.will_be_ready)]
        return ClusterView(self._loads(replicas, adapters), adapters, [])

    def loading(self, adapters: list[AdapterLoad]) -> ClusterView:
        """What adapters are loaded by: those that requests use count as pinned."""
        replicas = self._ready()
        return ClusterView(self._loads(replicas, adapters, keep_used=True), adapters, [])

    def planning(self, adapters: list[AdapterLoad], classes: list[RequestClass]) -> ClusterView:
        """What requests are moved by."""
        return ClusterView(self._loads(self._ready(), adapters), adapters, classes)

    def summary(self) -> ClusterView:
        """What triggers are judged by: one class for all requests of a replica, and no adapters. Cheap."""
        replicas = self._ready()
        classes = [one for one in map(self._everything, replicas) if one.count]
        return ClusterView(self._loads(replicas, []), [], classes)

    def _ready(self) -> list[Replica]:
        return [replica for replica in self._replicas.ready() if replica.model is not None]

    def _costs(self, replicas: list[Replica]) -> dict[int, ReplicaCosts]:
        """For decode steps of what each would run if all had the same."""
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

    def _usual_step(self, replicas: list[Replica]) -> tuple[int, dict[str, tuple[int, int]]]:
        """Sequences of the base, and those and the rank rows of each adapter, in the mean step of these replicas."""
        backlogs = [self._requests.backlog(replica.replica_id) for replica in replicas]
        total = sum(backlog.num_sequences for backlog in backlogs)
        batch = min(max(math.ceil(total / max(len(replicas), 1)), 1), self._max_num_seqs)
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
        costs = self._costs(replicas)
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
                    adapter_bytes=_adapter_room(replica, adapters),
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
            decode_tokens=max(backlog.output_tokens / count, 0.0),
            kv_blocks=math.ceil(demand / count),
        )


def _kv_blocks(replica: Replica) -> tuple[int, int]:
    """Blocks of a replica and those that are free; all of them until it has reported."""
    stats = replica.stats
    if stats.num_blocks:
        return stats.num_blocks, stats.num_free_blocks
    blocks = replica.model.num_blocks if replica.model else 0
    return blocks, blocks


def _adapter_room(replica: Replica, adapters: list[AdapterLoad]) -> int:
    """Bytes for adapters: as many of the mean size as there are slots, but no more than the device has memory for."""
    total = sum(one.num_bytes for one in adapters)
    model = replica.model
    if model is None or not adapters or not model.max_loras:
        return total
    slots = model.max_loras * total // len(adapters)
    return min(slots, model.adapter_bytes) if model.adapter_bytes else slots
