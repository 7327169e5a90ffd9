"""The parts of ``/metrics`` that need no server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from peft_dist.api.metrics import StateCollector
from peft_dist.api.request_metrics import RequestMetrics
from peft_dist.core.messages import ReplicaDetail, ReplicaStats
from peft_dist.orchestrator.move_counts import DRAIN, PLAN, MoveCounts
from peft_dist.orchestrator.observation import MigrationView, ReplicaTotals, ReplicaView
from tests.api.http_support import BASE, ScriptedClient
from tests.api.metrics_support import Scrape, adapter


def scraped(registry: CollectorRegistry) -> Scrape:
    return Scrape(generate_latest(registry).decode())


def view(replica_id: int, state: str, stats: ReplicaStats, detail: ReplicaDetail) -> ReplicaView:
    return ReplicaView(replica_id, state, ScriptedClient().model, stats, detail, ReplicaTotals.of(stats, detail))


def test_times_are_those_of_the_sequences() -> None:
    now = [10.0]
    metrics = RequestMetrics(5, clock=lambda: now[0])
    watch = metrics.watch(adapter("sql"))
    assert metrics.recent_adapters() == [], "nothing is used before it is admitted"
    watch.admitted(2, 7)
    # The second sequence never draws: only its end is timed.
    for at, index, num_tokens, reason in (
        (12.0, 0, 1, None),
        (12.5, 0, 1, None),
        (13.5, 0, 2, None),
        (14.0, 1, 0, "length"),
        (16.0, 0, 0, "stop"),
        (99.0, 0, 1, "stop"),
    ):
        now[0] = at
        watch.progress(index, num_tokens, reason)
    watch.close("abort")
    scrape = scraped(metrics.registry)
    assert scrape.value("peft_dist:time_to_first_token_seconds_sum") == 2.0
    assert scrape.value("peft_dist:inter_token_latency_seconds_sum") == 0.5 + 0.5
    assert scrape.value("peft_dist:inter_token_latency_seconds_bucket", le="0.5") == 2
    assert scrape.value("peft_dist:e2e_request_latency_seconds_sum") == 4.0 + 6.0
    assert scrape.value("peft_dist:generation_tokens_total") == 4
    assert scrape.value("peft_dist:prompt_tokens_total") == 7
    assert scrape.value("peft_dist:sequences_finished_total", finish_reason="abort") == 0
    assert metrics.recent_adapters() == ["hash-sql"]


def test_the_time_in_the_queue_counts_once_a_sequence() -> None:
    metrics = RequestMetrics(5)
    watch = metrics.watch(None)
    watch.admitted(3, 7)
    for index, seconds in ((0, 0.02), (0, 0.02), (1, None), (1, 3.0), (7, 1.0)):
        watch.queued(index, seconds)
    scrape = scraped(metrics.registry)
    assert scrape.value("peft_dist:request_queue_seconds_count") == 2, "the third never ran"
    assert scrape.value("peft_dist:request_queue_seconds_sum") == 3.02
    registry = CollectorRegistry()
    replicas = [view(0, "ready", ReplicaStats(), ReplicaDetail())]
    registry.register(StateCollector(replicas, [], 0, [], 100, metrics, 12.0))
    labels = {"model_name": BASE, "engine": "0"}
    theirs = scraped(registry)
    assert theirs.value("vllm:request_queue_time_seconds_count", **labels) == 2
    assert theirs.value("vllm:request_queue_time_seconds_sum", **labels) == 3.02
    assert theirs.value("vllm:request_queue_time_seconds_bucket", le="1.0", **labels) == 1
    assert theirs.value("vllm:request_queue_time_seconds_bucket", le="+Inf", **labels) == 2


def test_dashboards_find_what_they_know_by_vllms_names() -> None:
    metrics = RequestMetrics(5, iter([0.0, 1.0, 1.5, 2.0, 2.0, 3.0]).__next__)
    watch = metrics.watch(None)
    watch.admitted(2, 7)
    watch.progress(0, 1, None)
    watch.progress(0, 1, None)
    watch.progress(0, 0, "stop")
    watch.progress(1, 0, "error")
    registry = CollectorRegistry()
    registry.register(
        StateCollector([view(0, "ready", ReplicaStats(), ReplicaDetail())], [], 0, [], 100, metrics, 12.0)
    )
    labels = {"model_name": BASE, "engine": "0"}
    theirs = scraped(registry)
    assert theirs.value("vllm:time_to_first_token_seconds_sum", **labels) == 1.0
    assert theirs.value("vllm:inter_token_latency_seconds_sum", **labels) == 0.5
    assert theirs.value("vllm:e2e_request_latency_seconds_sum", **labels) == 2.0
    assert theirs.value("vllm:prompt_tokens_total", **labels) == 7
    assert theirs.value("vllm:generation_tokens_total", **labels) == 2
    found = theirs.by("vllm:request_success_total", "finished_reason")
    assert found == {("stop",): 1, ("length",): 0, ("abort",): 0}, "one that failed is no success"


def test_several_replicas_tell_of_plans_and_moves() -> None:
    counts = MoveCounts()
    for cause in (PLAN, PLAN, DRAIN):
        counts.recompute(cause)
    for seconds in (0.02, 0.05, 30.0):
        counts.bring(PLAN, {"device": 1000}, seconds)
    for outcome in ("recomputed", "stayed"):
        counts.fail(PLAN, outcome)
    live = counts.view()
    assert (counts.latest(2), counts.latest(0), len(counts.latest(9))) == ([0.05, 30.0], [], 3)
    plans = {("solver", "memory"): 2, ("stay", "period"): 5}
    migrated = MigrationView("dlora", plans, live.by_way(PLAN), 3, 1.5, 4, live)
    requests = RequestMetrics(5)
    for migration in (migrated, None):
        registry = CollectorRegistry()
        registry.register(StateCollector([], [], 0, [], 100, requests, 12.0, migration))
        scrape = scraped(registry)
        names = {"plans", "moves", "moves_dropped", "plan_seconds"}
        assert all((f"peft_dist:migration_{name}_total" in scrape.types) is (migration is not None) for name in names)
        if migration is None:
            continue
        assert scrape.value("peft_dist:migration_plans_total", origin="solver", trigger="memory") == 2
        assert scrape.value("peft_dist:migration_moves_total", way="recompute") == 3
        assert scrape.value("peft_dist:migration_moves_total", way="kv") == 3
        ends = {"cause": "plan", "way": "kv"}
        assert scrape.value("peft_dist:live_moves_total", **ends, outcome="moved") == 3
        assert scrape.value("peft_dist:live_moves_total", **ends, outcome="stayed") == 1
        assert scrape.value("peft_dist:live_moves_total", cause="drain", way="recompute", outcome="moved") == 1
        assert scrape.value("peft_dist:live_move_kv_bytes_total", memory="device") == 3000
        assert scrape.value("peft_dist:live_move_kv_bytes_total", memory="host") == 0
        buckets = [scrape.value("peft_dist:live_move_seconds_bucket", le=le) for le in ("0.01", "0.05", "10.0", "+Inf")]
        assert buckets == [0, 2, 2, 3] and scrape.value("peft_dist:live_move_seconds_sum") == 30.07
        assert scrape.value("peft_dist:migration_moves_dropped_total") == 3
        assert scrape.value("peft_dist:migration_plan_seconds_total") == 1.5
        assert scrape.value("peft_dist:placements_total") == 4


def test_what_is_remembered_of_use_is_bounded() -> None:
    metrics = RequestMetrics(3)
    for name in "abcbda":
        metrics.use_adapter(name)
    assert metrics.recent_adapters() == ["b", "d", "a"]


def test_replicas_have_series_of_their_own_but_are_one_to_a_router() -> None:
    first = ReplicaStats(2, 1, 1, 50, 100, resident_adapters=["hash-a"])
    second = ReplicaStats(3, 4, 0, 0, 100, resident_adapters=["hash-b"])
    replicas = [
        view(0, "ready", first, ReplicaDetail(running={"hash-a": 2})),
        view(1, "ready", second, ReplicaDetail(merged_adapter="hash-b", waiting={"hash-c": 4})),
        view(2, "dead", ReplicaStats(9, 9, 9, 0, 100), ReplicaDetail(running={"hash-a": 9}, num_switches=4)),
        view(3, "starting", ReplicaStats(), ReplicaDetail()),
        view(4, "unreached", ReplicaStats(9, 9, 9, 0, 100), ReplicaDetail(running={"hash-a": 9})),
    ]
    registry = CollectorRegistry()
    requests = RequestMetrics(5)
    registry.register(StateCollector(replicas, [adapter(name) for name in "abc"], 1, [], 100, requests, 12.0))
    scrape = scraped(registry)
    states = {"starting": 1, "ready": 2, "draining": 0, "drained": 0, "unreached": 1, "dead": 1}
    assert scrape.by("peft_dist:replicas", "state") == {(state,): count for state, count in states.items()}
    assert scrape.by("peft_dist:merged", "replica") == {("0",): 0, ("1",): 1}
    assert scrape.by("peft_dist:switches_total", "replica") == {("0",): 0, ("1",): 0, ("2",): 4, ("3",): 0, ("4",): 0}
    assert scrape.value("peft_dist:adapter_requests_waiting", replica="1", adapter="c") == 4
    labels = {"model_name": BASE, "engine": "0"}
    assert scrape.value("vllm:num_requests_running", **labels) == 5
    assert scrape.value("vllm:num_requests_waiting", **labels) == 6
    assert scrape.value("vllm:kv_cache_usage_perc", **labels) == 0.75
    assert scrape.value("vllm:cache_config_info", block_size="16", num_gpu_blocks="2000", engine="0") == 1
    adapters = {"max_lora": "16", "running_lora_adapters": "a,b", "waiting_lora_adapters": "c"}
    assert scrape.value("vllm:lora_requests_info", **adapters) == 12.0
