"""``/metrics``: what one server and its replicas look like from outside, in Prometheus' text format."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from peft_dist.api.metric_labels import AdapterLabels
from peft_dist.api.migration_metrics import migration_families
from peft_dist.api.replica_metrics import replica_families
from peft_dist.api.request_metrics import RequestMetrics
from peft_dist.api.router_metrics import request_families, router_families
from peft_dist.api.unread import UnreadWatch
from peft_dist.api.unread_metrics import UnreadView, unread_families
from peft_dist.core.adapter import AdapterSpec
from peft_dist.orchestrator.client import EngineClient
from peft_dist.orchestrator.observation import MigrationView, ReplicaView

# What ``generate_latest`` writes, whichever version of prometheus-client is installed.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True, eq=False)
class StateCollector:
    """A ``prometheus_client`` collector over what was known at one moment.

    Attributes:
        requests: What was counted and timed.
        wall_time: Seconds since 1970.
        migration: None with one replica.
        unread: What clients have not read.
    """

    replicas: list[ReplicaView]
    adapters: list[AdapterSpec]
    num_pinned: int
    recent: list[str]
    max_adapters: int
    requests: RequestMetrics
    wall_time: float
    migration: MigrationView | None = None
    unread: UnreadView = field(default_factory=UnreadView)

    def collect(self) -> Iterator[Any]:
        labels = AdapterLabels(self.replicas, self.adapters, self.recent, self.max_adapters)
        yield from replica_families(self.replicas, len(self.adapters), self.num_pinned, labels)
        if self.migration is not None:
            yield from migration_families(self.migration)
        yield from unread_families(self.unread)
        yield from router_families(self.replicas, labels, self.wall_time)
        yield from request_families(self.replicas, self.requests)


class ServerMetrics:
    """The metrics of one server.

    Args:
        client: Asked for the state of its replicas at every scrape; it may have none.
        max_adapters: Adapters that get series of their own.
        unread: Of the connections.
    """

    def __init__(self, client: EngineClient, max_adapters: int, unread: UnreadWatch) -> None:
        self.requests = RequestMetrics(max_adapters)
        self._client = client
        self._max_adapters = max_adapters
        self._unread = unread

    async def exposition(self) -> bytes:
        """Everything, for one scrape.

        On the event loop only references are copied; choosing, summing and writing happens in a thread, as a
        thousand adapters would otherwise hold up every stream.
        """
        registry = CollectorRegistry()
        registry.register(
            StateCollector(
                self._client.replicas(),
                self._client.adapters(),
                len(self._client.pinned_adapters()),
                self.requests.recent_adapters(),
                self._max_adapters,
                self.requests,
                time.time(),
                self._client.migration(),
                UnreadView(self._client.num_unread, self._unread.num_bytes, self._unread.num_cut),
            )
        )
        registry.register(self.requests.registry)
        return await asyncio.to_thread(_written, registry)


def _written(registry: CollectorRegistry) -> bytes:
    text: bytes = generate_latest(registry)
    return text
