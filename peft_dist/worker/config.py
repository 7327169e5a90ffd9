"""What a worker process is told when it starts."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError

DEFAULT_REPLICA_FACTORY = "peft_dist.runner.worker_replica:build_worker_replica"


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Written by a launcher as JSON, read by the worker.

    Attributes:
        endpoint: ZeroMQ address of the orchestrator.
        replica_id, epoch: Which incarnation of which replica this is.
        engine: Options of the replica.
        world_size: Processes that the replica should have.
        replica_factory: "module:function" that makes a replica of an ``EngineConfig``.
        heartbeat_seconds: Between two signs of life.
        key_file: Of the ``ClusterKeys`` that the orchestrator asks for over TCP, as replicas of other hosts do; None
            where they ask for none.
        kv_endpoint: Where replicas of other hosts may read exported KV, such as "tcp://10.0.0.5:*", with these keys;
            None: nowhere.
        log_level: Of the worker's own log on stderr.
        orphan_timeout: Seconds that it waits for another orchestrator when its own is gone; None: it ends at once.
        silence: Seconds without a word of the orchestrator after which it drops its requests, which others may have by
            then. A guest's is gone then; the end of any other is told by standard input. None: Silence means nothing.
        guest, attempt: Of one that joined: the name of the socket that asked for it, and which time that was.
        told: What the orchestrator asked for, where ``engine`` is not that.
    """

    endpoint: str
    replica_id: int
    epoch: int
    engine: EngineConfig
    world_size: int = 1
    replica_factory: str = DEFAULT_REPLICA_FACTORY
    heartbeat_seconds: float = 1.0
    key_file: str | None = None
    kv_endpoint: str | None = None
    log_level: str = "info"
    orphan_timeout: float | None = None
    silence: float | None = None
    guest: str | None = None
    attempt: int = 0
    told: EngineConfig | None = None

    def write(self, path: Path) -> None:
        """Write it as JSON, for ``read`` in the worker's process."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self)))

    @classmethod
    def read(cls, path: Path) -> WorkerConfig:
        """Raises ConfigError when the file holds anything else than a WorkerConfig."""
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path} is no worker configuration of this release: {error}") from error

    def keys(self) -> ClusterKeys | None:
        """What the key file holds. Raises ConfigError when that is no keys."""
        return None if self.key_file is None else ClusterKeys.read(Path(self.key_file))

    def link_keys(self) -> ClusterKeys | None:
        """Those for the orchestrator's socket: one of this host alone, in a folder of this user's, asks for none."""
        return self.keys() if self.endpoint.startswith("tcp://") else None

    def load_factory(self) -> Callable[[EngineConfig], Any]:
        """Raises ConfigError when there is no such function."""
        module, _, function = self.replica_factory.partition(":")
        try:
            factory: Callable[[EngineConfig], Any] = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"replica_factory={self.replica_factory!r} cannot be used: {error}") from error
        return factory
