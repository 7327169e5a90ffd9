"""Reads Prometheus' text format, for the tests of ``/metrics``."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from peft_dist.core.adapter import AdapterSpec

REPLICA_GAUGES = (
    "merged",
    "warm",
    "requests_running",
    "requests_waiting",
    "requests_swapped",
    "kv_blocks",
    "kv_blocks_free",
    "memory_peak_bytes",
    "kv_cache_usage_ratio",
)
REPLICA_COUNTERS = (
    "switches",
    "switch_seconds",
    "adapter_loads",
    "adapter_evictions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "preemptions",
    "steps",
    "replica_restarts",
)
REQUEST_COUNTERS = (
    "prompt_tokens",
    "generation_tokens",
    "sequences_admitted",
    "sequences_finished",
    "request_errors",
    "clients_cut",
)
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_seconds",
)
OTHER_GAUGES = (
    "replicas",
    "adapters_served",
    "adapters_pinned",
    "adapters_refused",
    "sequences_unread",
    "unsent_bytes",
    "policy",
    "merged_adapter_info",
    "adapter_requests_running",
    "adapter_requests_waiting",
    "adapter_credit",
    "resident_adapters",
    "adapter_bytes",
)
ROUTER_GAUGES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "gpu_cache_usage_perc",
    "cache_config_info",
    "lora_requests_info",
)
ROUTER_HISTOGRAMS = (
    "request_queue_time_seconds",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
)
ROUTER_COUNTERS = ("prompt_tokens", "generation_tokens", "request_success")
# Type of every family, under the names that are on the page.
FAMILIES = {
    **{f"peft_dist:{name}": "gauge" for name in (*REPLICA_GAUGES, *OTHER_GAUGES)},
    **{f"peft_dist:{name}_total": "counter" for name in (*REPLICA_COUNTERS, *REQUEST_COUNTERS)},
    **{f"peft_dist:{name}": "histogram" for name in HISTOGRAMS},
    **{f"vllm:{name}": "gauge" for name in ROUTER_GAUGES},
    **{f"vllm:{name}": "histogram" for name in ROUTER_HISTOGRAMS},
    **{f"vllm:{name}_total": "counter" for name in ROUTER_COUNTERS},
}


class Scrape:
    """One reading of ``/metrics``; fails where the text is wrong or a series is there twice."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.types: dict[str, str] = {}
        self.samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in text_string_to_metric_families(text):
            assert family.documentation
            name = f"{family.name}_total" if family.type == "counter" else family.name
            assert name not in self.types
            self.types[name] = family.type
            for sample in family.samples:
                key = sample.name, frozenset(sample.labels.items())
                assert key not in self.samples, f"{key} is there twice"
                self.samples[key] = sample.value

    @classmethod
    def of(cls, http: httpx.Client) -> Scrape:
        response = http.get("/metrics")
        assert response.status_code == 200
        return cls(response.text)

    def value(self, name: str, /, **labels: str) -> float:
        return self.samples[name, frozenset(labels.items())]

    def by(self, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Values of all series of a metric by some of their labels."""
        return {tuple(dict(ls)[label] for label in labels): v for (n, ls), v in self.samples.items() if n == name}

    def counters(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        endings = ("_total", "_bucket", "_count", "_sum")
        return {key: value for key, value in self.samples.items() if key[0].endswith(endings)}

    def label_values(self, label: str) -> set[str]:
        return {value for _, labels in self.samples for name, value in labels if name == label}


def adapter(name: str, content: str | None = None) -> AdapterSpec:
    content_hash = f"hash-{content or name}"
    return AdapterSpec(name=name, content_hash=content_hash, path="/adapters", ranks={"q": 8}, num_bytes=64)
