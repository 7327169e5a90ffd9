"""A Ray cluster of several nodes on this machine, each with room for one replica."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.config import EngineConfig
from peft_dist.orchestrator.link import Link
from peft_dist.orchestrator.service import EngineService
from peft_dist.worker import ray_cluster
from peft_dist.worker.ray_cluster import RaySettings
from peft_dist.worker.ray_launcher import RayLauncher
from tests.e2e.fault_scenario import Started

# The least that Ray takes.
_SMALL = {"object_store_memory": 80 << 20}
# How soon a node that has died is known to have, in place of half a minute.
_HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


class RayNodes:
    """Nodes of some CPUs each; the head has none."""

    def __init__(self, host: str, settings: RaySettings, cluster: Any = None, cpus: int = 1) -> None:
        """``host``: Of this machine. ``cluster``: To which nodes of so many ``cpus`` can be added."""
        self.settings = settings
        self._host, self._cluster, self._cpus = host, cluster, cpus
        self._nodes: list[Any] = []

    def launcher(self, config: EngineConfig, num_replicas: int, heartbeat: float, **more: Any) -> Started:
        keys = ClusterKeys.make()
        options = {"log_level": "error", "heartbeat_seconds": heartbeat, "num_replicas": num_replicas, **more}
        launcher = RayLauncher(config, self.settings, keys, **options)
        return launcher, Link.listening(f"tcp://{self._host}:0", keys)

    def node_of(self, replica_id: int) -> str:
        """The id of the node that a replica runs on."""
        [node_id] = self.nodes_of(replica_id)
        return node_id

    def nodes_of(self, replica_id: int) -> set[str]:
        """The ids of the nodes that its ranks run on."""
        from ray.util import placement_group_table

        [group] = [
            group
            for group in placement_group_table().values()
            if group["name"].startswith(f"peft-dist replica {replica_id} ") and group["state"] == "CREATED"
        ]
        return set(group["bundles_to_node_id"].values())

    async def take_away(self, service: EngineService, replica_id: int) -> None:
        await self.remove(replica_id)
        await self.add()

    async def remove(self, replica_id: int) -> None:
        """Kill the node of a replica."""
        [node] = [node for node in self._nodes if node.node_id == self.node_of(replica_id)]
        self._nodes.remove(node)
        await asyncio.to_thread(self._cluster.remove_node, node, allow_graceful=False)

    async def add(self) -> None:
        """Another node."""
        await asyncio.to_thread(self.add_nodes, 1)

    def add_nodes(self, number: int) -> None:
        for _ in range(number):
            self._nodes.append(self._cluster.add_node(num_cpus=self._cpus, **_SMALL))


@contextmanager
def ray_nodes(number: int, cpus: int = 1, **settings: Any) -> Iterator[RayNodes]:
    """Until the end of the block. ``settings``: Of ``RaySettings``."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": _HEALTH, **_SMALL}
    # With handlers of its own for signals, nodes could be added from the main thread alone, which has to serve.
    cluster = Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)
    try:
        wanted = RaySettings(cluster.address, **settings)
        nodes = RayNodes(ray_cluster.connect(wanted), wanted, cluster, cpus)
        nodes.add_nodes(number)
        yield nodes
    finally:
        ray_cluster.disconnect()
        cluster.shutdown()
