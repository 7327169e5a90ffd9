"""What inference routers and dashboards read, under the names that vLLM gave it.

Names, types and labels are those of vLLM (https://docs.vllm.ai/en/stable/usage/metrics/); their meaning is the Model
Server Protocol of the Gateway API inference extension
(https://github.com/kubernetes-sigs/gateway-api-inference-extension/tree/main/docs/proposals/003-model-server-protocol).
A router reads one sample of each, so that the server speaks for all its replicas, as engine 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import Histogram
from prometheus_client.core import GaugeMetricFamily, Metric

from peft_dist.api.metric_labels import AdapterLabels, readable
from peft_dist.api.replica_metrics import kv_usage
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


def queue_time(replicas: Sequence[ReplicaView], seconds: Histogram) -> Metric:
    """Our histogram of seconds in the queue under vLLM's name and labels."""
    family = Metric(
        "vllm:request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", "histogram"
    )
    labels = {"model_name": _model_name(replicas), "engine": _ENGINE}
    for own in seconds.collect():
        for sample in own.samples:
            ending = sample.name.removeprefix(own.name)
            if ending != "_created":
                family.add_sample(family.name + ending, sample.labels | labels, sample.value)
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
