"""What inference routers and dashboards read, under the names that vLLM gave it.

Names, types and labels are those of vLLM (https://docs.vllm.ai/en/stable/usage/metrics/); their meaning is the Model
Server Protocol of the Gateway API inference extension
(https://github.com/kubernetes-sigs/gateway-api-inference-extension/tree/main/docs/proposals/003-model-server-protocol).
A router reads one sample of each, so that the server speaks for all its replicas, as engine 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from peft_dist.api.metric_labels import AdapterLabels, readable
from peft_dist.api.replica_metrics import kv_usage
from peft_dist.api.request_metrics import RequestMetrics
from peft_dist.api.token_metrics import TokenCounter, TokenHistogram
from peft_dist.orchestrator.observation import ReplicaView

_ENGINE = "0"


def router_families(replicas: Sequence[ReplicaView], labels: AdapterLabels, wall_time: float) -> Iterator[Any]:
    """``wall_time`` in seconds since 1970."""
    ready = [replica for replica in replicas if replica.is_ready]
    model_name = _model_name(replicas)
    running = sum(replica.stats.num_running for replica in ready)
    waiting = sum(replica.stats.num_waiting + replica.stats.num_swapped for replica in ready)
    usage = kv_usage(ready)
    for name, text, value in (
        ("num_requests_running", "Number of requests in model execution batches.", running),
        ("num_requests_waiting", "Number of requests waiting to be processed.", waiting),
        ("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", usage),
        # vLLM's name before 0.9, which older routers ask for.
        ("gpu_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", usage),
    ):
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name", "engine"])
        family.add_metric([model_name, _ENGINE], value)
        yield family
    yield _cache_config(ready)
    yield _lora_requests(ready, labels, wall_time)


def request_families(replicas: Sequence[ReplicaView], requests: RequestMetrics) -> Iterator[Metric]:
    """What we count of requests under vLLM's names and labels."""
    labels = {"model_name": _model_name(replicas), "engine": _ENGINE}
    for name, text, own in (
        ("request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", requests.queue),
        ("time_to_first_token_seconds", "Histogram of time to first token in seconds.", requests.first_token),
        ("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", requests.inter_token),
        ("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", requests.whole),
        ("prompt_tokens", "Number of prefill tokens processed.", requests.prompt_tokens),
        ("generation_tokens", "Number of generation tokens processed.", requests.generation_tokens),
    ):
        yield _renamed(own, f"vllm:{name}", text, labels)
    # With a label of another name.
    success = CounterMetricFamily(
        "vllm:request_success", "Count of successfully processed requests.", labels=["finished_reason", *labels]
    )
    for family in requests.finished.collect():
        for sample in family.samples:
            if sample.name.endswith("_total") and sample.labels["finish_reason"] != "error":
                success.add_metric([sample.labels["finish_reason"], *labels.values()], sample.value)
    yield success


def _renamed(
    own: Histogram | Counter | TokenHistogram | TokenCounter, name: str, text: str, labels: dict[str, str]
) -> Metric:
    """A family of ours under another name, with more labels."""
    [collected] = own.collect()
    family = Metric(name, text, collected.type)
    for sample in collected.samples:
        ending = sample.name.removeprefix(collected.name)
        if ending != "_created":
            family.add_sample(name + ending, sample.labels | labels, sample.value)
    return family


def _model_name(replicas: Sequence[ReplicaView]) -> str:
    known = [replica for replica in replicas if replica.model is not None]
    models = [replica.model for replica in [r for r in known if r.is_ready] or known if replica.model is not None]
    return readable(models[0].served_model_name) if models else ""


def _cache_config(ready: Sequence[ReplicaView]) -> Any:
    family = GaugeMetricFamily(
        "vllm:cache_config_info", "Size of the KV cache.", labels=["block_size", "num_gpu_blocks", "engine"]
    )
    models = [replica.model for replica in ready if replica.model is not None]
    if models:
        blocks = sum(model.num_blocks for model in models)
        family.add_metric([str(models[0].block_size), str(blocks), _ENGINE], 1)
    return family


def _lora_requests(ready: Sequence[ReplicaView], labels: AdapterLabels, wall_time: float) -> Any:
    """The value is the time; of several series, routers take the one with the latest.

    The protocol calls adapters running that are on the device and ready to serve, whether or not they have
    requests at the moment. Routers compare with the names that clients use, so every name of a content is listed.
    """
    family = GaugeMetricFamily(
        "vllm:lora_requests_info",
        "Running stats on LoRA requests.",
        labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
    )
    most = sum(replica.model.max_loras for replica in ready if replica.model is not None)
    resident = {content_hash for replica in ready for content_hash in replica.stats.resident_adapters}
    waiting = {content_hash for replica in ready for content_hash, n in replica.detail.waiting.items() if n}
    family.add_metric([str(most), _listed(waiting, labels), _listed(resident, labels)], wall_time)
    return family


def _listed(content_hashes: set[str], labels: AdapterLabels) -> str:
    # A name with a comma would be read as two names, one of which may be another adapter's.
    return ",".join(name for name in labels.all_names(content_hashes) if "," not in name)
