"""What the replicas tell of themselves, as families of metrics named ``peft_dist:...``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

from peft_dist.api.metric_labels import AdapterLabels
from peft_dist.orchestrator.observation import ReplicaTotals, ReplicaView

_STATES = ("starting", "ready", "draining", "drained", "unreached", "dead")
_TIERS = ("device", "host", "disk")

_GAUGES: list[tuple[str, str, Callable[[ReplicaView], float]]] = [
    (
        "merged",
        "1 while the weights hold an adapter, 0 while they are the base's.",
        lambda r: r.detail.merged_adapter is not None,
    ),
    ("warm", "1 once all is compiled and captured that is done ahead, 0 before.", lambda r: r.is_warm),
    ("requests_running", "Sequences in the running batch.", lambda r: r.stats.num_running),
    ("requests_waiting", "Sequences that wait for the engine.", lambda r: r.stats.num_waiting),
    ("requests_swapped", "Sequences whose KV is in host memory.", lambda r: r.stats.num_swapped),
    ("adapters_refused", "Named adapters that the replica did not take when it started.", lambda r: len(r.refused)),
    ("kv_blocks", "KV blocks on the device.", lambda r: r.stats.num_blocks),
    ("kv_blocks_free", "KV blocks that no sequence holds.", lambda r: r.stats.num_free_blocks),
    (
        "memory_peak_bytes",
        "Device memory that the replica has reserved at most (of its first rank; on a CPU host memory).",
        lambda r: r.detail.peak_memory_bytes,
    ),
    ("kv_cache_usage_ratio", "Share of the KV blocks in use, 0 to 1.", lambda r: kv_usage([r])),
]
_COUNTERS: list[tuple[str, str, Callable[[ReplicaTotals], float]]] = [
    (
        "switches",
        "Changes between merged and base weights, or from one merged adapter to another.",
        lambda t: t.num_switches,
    ),
    ("switch_seconds", "Seconds that such changes took.", lambda t: t.switch_seconds),
    ("adapter_loads", "Adapters brought onto the device.", lambda t: t.num_adapter_loads),
    ("adapter_evictions", "Adapters that left the device for others.", lambda t: t.num_adapter_evictions),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda t: t.prefix_cache_queries),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda t: t.prefix_cache_hits),
    ("preemptions", "Sequences put back because KV blocks ran out.", lambda t: t.num_preemptions),
]


def kv_usage(replicas: Iterable[ReplicaView]) -> float:
    """Share of the replicas' KV blocks in use, 0 to 1."""
    blocks = [(replica.stats.num_free_blocks, replica.stats.num_blocks) for replica in replicas]
    total = sum(count for _, count in blocks)
    return 1 - sum(free for free, _ in blocks) / total if total else 0.0


def replica_families(
    replicas: Sequence[ReplicaView], num_adapters: int, num_pinned: int, labels: AdapterLabels
) -> Iterator[Any]:
    """Gauges of the replicas that serve, counters of all of them, however they ended."""
    ready = [replica for replica in replicas if replica.is_ready]
    states = Counter(replica.state for replica in replicas)
    yield _family(GaugeMetricFamily, "replicas", "Replicas by state.", ["state"], [((s,), states[s]) for s in _STATES])
    yield _family(GaugeMetricFamily, "adapters_served", "Adapters that requests can name.", [], [((), num_adapters)])
    text = "Of these, adapters that are pinned to the device."
    yield _family(GaugeMetricFamily, "adapters_pinned", text, [], [((), num_pinned)])
    for name, text, value in _GAUGES:
        yield _family(GaugeMetricFamily, name, text, ["replica"], [((_id(r),), value(r)) for r in ready])
    lives = [((_id(r),), r.num_restarts) for r in replicas]
    yield _family(CounterMetricFamily, "replica_restarts", "Starts of a replica after the first.", ["replica"], lives)
    for name, text, count in _COUNTERS:
        rows = [((_id(r),), count(r.totals)) for r in replicas]
        yield _family(CounterMetricFamily, name, text, ["replica"], rows)
    steps = [
        ((_id(r), mode), number)
        for r in replicas
        for mode, number in (("merged", r.totals.num_merged_steps), ("unmerged", r.totals.num_unmerged_steps))
    ]
    yield _family(CounterMetricFamily, "steps", "Engine steps by mode.", ["replica", "mode"], steps)
    policy = [((_id(r), name), value) for r in ready for name, value in r.detail.policy.items()]
    yield _family(GaugeMetricFamily, "policy", "The batching policy's own numbers.", ["replica", "name"], policy)
    yield from _by_adapter(ready, labels)
    yield from _residency(ready, labels)


def _by_adapter(ready: Sequence[ReplicaView], labels: AdapterLabels) -> Iterator[Any]:
    merged = InfoMetricFamily("peft_dist:merged_adapter", "The adapter that the weights hold.", labels=["replica"])
    for replica in ready:
        if replica.detail.merged_adapter is not None:
            merged.add_metric([_id(replica)], {"adapter": labels.of(replica.detail.merged_adapter)})
    yield merged
    names = ["replica", "adapter"]
    running = [((_id(r), label), n) for r in ready for label, n in labels.sums(r.detail.running).items()]
    yield _family(GaugeMetricFamily, "adapter_requests_running", "Running sequences by adapter.", names, running)
    waiting = [((_id(r), label), n) for r in ready for label, n in labels.sums(r.detail.waiting).items()]
    yield _family(GaugeMetricFamily, "adapter_requests_waiting", "Waiting sequences by adapter.", names, waiting)
    credit = [((_id(r), label), n) for r in ready for label, n in labels.sums(r.detail.credits, fill=False).items()]
    yield _family(GaugeMetricFamily, "adapter_credit", "Credit that the policy owes an adapter.", names, credit)


def _residency(ready: Sequence[ReplicaView], labels: AdapterLabels) -> Iterator[Any]:
    numbers: Counter[tuple[str, ...]] = Counter({(_id(r), tier): 0 for r in ready for tier in _TIERS})
    sizes: Counter[tuple[str, ...]] = Counter()
    for replica in ready:
        for held in replica.detail.adapters:
            label = labels.of(held.content_hash)
            rank = str(held.rank) if labels.has_own(held.content_hash) else ""
            numbers[_id(replica), held.tier] += 1
            sizes[_id(replica), label, held.tier, rank] += held.num_bytes
    text = "Adapters by where their weights are."
    yield _family(GaugeMetricFamily, "resident_adapters", text, ["replica", "tier"], numbers.items())
    text = "Bytes of an adapter's weights, by where they are, with the largest rank of its modules."
    yield _family(GaugeMetricFamily, "adapter_bytes", text, ["replica", "adapter", "tier", "rank"], sizes.items())


def _family(
    kind: Any, name: str, text: str, labels: Sequence[str], rows: Iterable[tuple[tuple[str, ...], float]]
) -> Any:
    family = kind(f"peft_dist:{name}", text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def _id(replica: ReplicaView) -> str:
    return str(replica.replica_id)
