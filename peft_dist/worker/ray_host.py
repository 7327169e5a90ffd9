"""What runs on a Ray node: an actor for each rank of a replica, around the worker's process."""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.config import EngineConfig
from peft_dist.core.rank_meeting import meeting_environment
from peft_dist.worker.config import WorkerConfig
from peft_dist.worker.launcher import LaunchedReplica, PlainLauncher


@dataclass(frozen=True, slots=True)
class Order:
    """What a rank is to run; travels through Ray.

    Attributes:
        endpoint: The orchestrator's TCP address.
        keys: That it asks for.
        replica_id, epoch: Which incarnation of which replica this is a rank of.
        engine: Options of the replica.
    """

    endpoint: str
    keys: ClusterKeys
    replica_id: int
    epoch: int
    engine: EngineConfig
    replica_factory: str
    heartbeat_seconds: float
    log_level: str
    silence: float | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """Where a rank runs: the node's id in Ray, its address, and the port where the ranks meet, 0 if it is not there."""

    node_id: str
    host: str
    port: int


class RankHost:
    """An actor. The worker is a child process of it and not the actor's own process.

    So it is the same program as everywhere, ends as it does everywhere (by ``os._exit``, by signals, also when it is
    stopped), and Ray's threads and packages are not in it. Its lifeline is held by the actor: with the actor, of which
    Ray lets none outlive its node, its driver or the orchestrator that asked for it, the worker ends.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._process: LaunchedReplica | None = None
        self._listener: socket.socket | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="peft-dist-"))

    async def site(self, *, meets: bool) -> Site:
        """Where this is. ``meets``: The ranks are to meet here, at a port that is open from now on: the process of this
        rank takes it over, and nobody else can have it meanwhile."""
        import ray

        host, port = _own_address(), 0
        if meets:
            family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
            self._listener = socket.create_server((host, 0), family=family)
            port = self._listener.getsockname()[1]
        return Site(ray.get_runtime_context().get_node_id(), host, port)

    async def start(self, rank: int, meeting: Site) -> None:
        """Start the worker's process as this rank. Raises OSError when that cannot be done."""
        key_file = self._folder / "keys.json"
        self._order.keys.write(key_file)
        order, listener = self._order, self._listener
        world = self._world(rank, meeting)
        launcher = _RankLauncher(
            order, key_file, _own_address(), world, () if listener is None else (listener.fileno(),)
        )
        try:
            self._process = await launcher.start(order.endpoint, order.replica_id, order.epoch)
        finally:
            # If the process has it, the port ends with that: who meets there is not left waiting.
            self._close_port()

    async def wait(self) -> int:
        """Return code when the process has ended; negative is the signal that killed it."""
        assert self._process is not None
        code = await self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        return code

    async def stop(self) -> None:
        """Terminate the process, or kill it."""
        if self._process is not None:
            await self._process.stop(0.0)

    async def kill(self) -> None:
        """Kill the process, also when it is stopped."""
        if self._process is not None:
            self._process.kill()
            await self.wait()
        self._close_port()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _world(self, rank: int, meeting: Site) -> dict[str, str]:
        """What torch reads to let ranks meet. Each sees one device, which Ray has chosen."""
        size = self._order.engine.tensor_parallel_size
        if size == 1:
            return {}
        listener = None if self._listener is None else self._listener.fileno()
        return {"LOCAL_RANK": "0", **meeting_environment(rank, size, meeting.host, meeting.port, listener)}

    def _close_port(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None


def _own_address() -> str:
    """Of this node in the cluster."""
    import ray

    address: str = ray.util.get_node_ip_address()
    return address


class _RankLauncher(PlainLauncher):
    """Starts one rank; the others have hosts of their own."""

    starts_ranks = True

    def __init__(
        self, order: Order, key_file: Path, host: str, world: Mapping[str, str], inherited: Sequence[int] = ()
    ) -> None:
        super().__init__(
            order.engine,
            log_level=order.log_level,
            replica_factory=order.replica_factory,
            heartbeat_seconds=order.heartbeat_seconds,
            key_file=str(key_file),
            further={"silence": order.silence},
        )
        self._world = world
        self._own_inherited = tuple(inherited)
        # Of several ranks each serves its own part.
        self._kv_endpoint = f"tcp://{host}:*"

    def _config(self, endpoint: str, replica_id: int, epoch: int) -> WorkerConfig:
        # Of replicas of one host each reads the other's memory all the same.
        return msgspec.structs.replace(super()._config(endpoint, replica_id, epoch), kv_endpoint=self._kv_endpoint)

    def _environment(self, replica_id: int) -> dict[str, str]:
        return dict(self._world)

    def _inherited(self) -> Sequence[int]:
        return self._own_inherited
