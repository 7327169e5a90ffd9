"""A Ray cluster as this process sees it: which nodes there are, what is free on them, what a replica takes."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError

_CONNECT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class RaySettings:
    """How replicas use a Ray cluster.

    Attributes:
        address: ``host:port`` of its head; None is ``RAY_ADDRESS``, a cluster on this machine, or a new one here.
        cpus: CPUs of each rank; None is the model's threads, or 1.
        gpus: GPUs of each rank; None is 1 where the device is one, or could be as the cluster has any.
        placement_timeout: Seconds to wait for room before the start counts as failed.
    """

    address: str | None = None
    cpus: float | None = None
    gpus: float | None = None
    placement_timeout: float = 300.0


def connect(settings: RaySettings) -> str:
    """Join the Ray cluster as a driver; returns this machine's address in it.

    Raises:
        ConfigError: ray is not installed, or there is no such cluster.
    """
    # Replicas say much the same, and each is to be heard; read when ray is imported.
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError(f"--cluster ray needs {error.name}: pip install 'peft-dist[ray]'") from error
    if settings.address is not None and settings.address.startswith("ray://"):
        raise ConfigError(
            f"--ray-address {settings.address!r} is a Ray client's, and replicas connect to this process: run it on a "
            "node of the cluster, with host:port of its head"
        )
    try:
        if settings.address is not None:
            # Ray itself tries for minutes.
            host, _, port = settings.address.rpartition(":")
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        ray.init(settings.address, include_dashboard=False, log_to_driver=True, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"--ray-address {settings.address or 'auto'}: no Ray cluster can be used there ({error}). Start one with "
            "`ray start --head`, and other machines with `ray start --address=HEAD:6379`"
        ) from error
    own: str = ray.util.get_node_ip_address()
    return own


def disconnect() -> None:
    """Leave the Ray cluster, and end what was started there."""
    import ray

    ray.shutdown()


def bundle(settings: RaySettings, engine: EngineConfig, cluster: Mapping[str, float]) -> dict[str, float]:
    """What one rank takes of the node that it runs on, where the whole ``cluster`` has so much.

    Raises:
        ConfigError: a device that only means something on one machine, or nothing at all.
    """
    if engine.device.startswith("cuda:"):
        raise ConfigError(f"device={engine.device!r} names one GPU of one machine, and Ray chooses: use --device cuda")
    can_be_gpu = engine.device == "cuda" or (engine.device == "auto" and cluster.get("GPU", 0) > 0)
    gpus = settings.gpus if settings.gpus is not None else float(can_be_gpu)
    cpus = settings.cpus if settings.cpus is not None else float(engine.num_threads or 1)
    taken = {name: number for name, number in (("CPU", cpus), ("GPU", gpus)) if number}
    if not taken:
        raise ConfigError("a replica that takes neither CPUs nor GPUs is none to Ray: raise --ray-cpus or --ray-gpus")
    return taken


def packing(one: Mapping[str, float], number: int, nodes: Iterable[Mapping[str, float]]) -> str:
    """How so many bundles are to be packed: on one node if any of ``nodes`` is large enough, or else on few."""
    fits = any(all(node.get(name, 0) >= number * amount for name, amount in one.items()) for node in nodes)
    return "STRICT_PACK" if fits or number == 1 else "PACK"


def nodes() -> list[dict[str, float]]:
    """What each living node has, free or not."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def describe(resources: Mapping[str, Any]) -> str:
    """CPUs and GPUs among them, in words."""
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU") if name in resources) or "none"


def free() -> str:
    """What is free in the whole cluster, in words."""
    import ray

    return describe(ray.available_resources())
