"""Starts replicas on the nodes of a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.config import EngineConfig
from peft_dist.core.waiting import unless
from peft_dist.worker import ray_cluster
from peft_dist.worker.config import DEFAULT_REPLICA_FACTORY
from peft_dist.worker.ray_cluster import RaySettings
from peft_dist.worker.ray_host import Order, RankHost, Site

_T = TypeVar("_T")
logger = logging.getLogger(__name__)
# Between two looks at which nodes there are, while there is no room.
_LOOK_SECONDS = 1.0
# Waiting for so long is not worth a word.
_SOON = 2.0
# For an actor to do what it was asked, if its node still can.
_ANSWER_SECONDS = 2.0
_STOP_SECONDS = 8.0


class RayLauncher:
    """One placement group for each start of a replica, and an actor in it for each of its ranks."""

    def __init__(
        self,
        engine: EngineConfig,
        settings: RaySettings,
        keys: ClusterKeys,
        *,
        log_level: str = "info",
        replica_factory: str = DEFAULT_REPLICA_FACTORY,
        heartbeat_seconds: float = 1.0,
        num_replicas: int = 1,
        silence: float | None = None,
    ) -> None:
        """After ``connect``. ``keys``: Of the orchestrator's socket. ``silence``: As in ``WorkerConfig``.

        Raises:
            ConfigError: the options do not fit a Ray cluster.
        """
        import ray

        self._engine = engine
        self._num_replicas = num_replicas
        self._timeout = settings.placement_timeout
        self._bundle = ray_cluster.bundle(settings, engine, ray.cluster_resources())
        self._order = Order("", keys, -1, 0, engine, replica_factory, heartbeat_seconds, log_level, silence)

    async def start(self, endpoint: str, replica_id: int, epoch: int) -> RayReplica:
        """Returns at once: that there is no room shows in ``wait``."""
        order = replace(
            self._order, endpoint=endpoint, replica_id=replica_id, epoch=epoch, engine=self._share(replica_id)
        )
        return RayReplica(order, self._bundle, self._timeout)

    def _share(self, replica_id: int) -> EngineConfig:
        log = self._engine.decision_log
        if log is None or self._num_replicas == 1:
            return self._engine
        return replace(self._engine, decision_log=f"{log}.{replica_id}")


class RayReplica:
    """A ``ReplicaProcess``: from the wait for room to the end of the last actor.

    What asks the cluster may wait for it, and so is done on a thread.
    """

    def __init__(self, order: Order, bundle: Mapping[str, float], timeout: float) -> None:
        self._order = order
        self._bundle = dict(bundle)
        self._size = order.engine.tensor_parallel_size
        self._timeout = timeout
        self._group: Any = None
        self._hosts: list[Any] = []
        self._killed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._end = asyncio.ensure_future(self._live())

    async def wait(self) -> int:
        """As in ``ReplicaProcess``."""
        return await asyncio.shield(self._end)

    async def stop(self, grace: float) -> None:
        """As in ``ReplicaProcess``."""
        if not await self._ends_within(grace):
            for host in self._hosts:
                _discard(host.stop.remote())
            if not self._hosts or not await self._ends_within(_STOP_SECONDS):
                self.kill()
                await asyncio.wait([self._end])

    def kill(self) -> None:
        """As in ``ReplicaProcess``."""
        self._killed.set()

    async def _ends_within(self, seconds: float) -> bool:
        done, _ = await asyncio.wait([self._end], timeout=seconds)
        return bool(done)

    async def _live(self) -> int:
        try:
            code = await unless(self._killed, self._run())
            return -signal.SIGKILL if code is None else code
        finally:
            await self._clean_up()
            self._thread.shutdown(wait=False)

    async def _run(self) -> int:
        from ray.exceptions import RayError

        try:
            await self._find_room()
            await self._in_thread(self._make_hosts)
            # They meet at rank 0, if there are several.
            meets = [self._size > 1 and rank == 0 for rank in range(self._size)]
            asked = [host.site.remote(meets=here) for host, here in zip(self._hosts, meets, strict=True)]
            sites: list[Site] = await asyncio.gather(*map(_value, asked))
            where = ", ".join(sorted({f"{site.host} (node {site.node_id[:8]})" for site in sites}))
            logger.info("replica %d runs on %s", self._order.replica_id, where)
            starts = [host.start.remote(rank, sites[0]) for rank, host in enumerate(self._hosts)]
            await asyncio.gather(*(_value(start) for start in starts))
            # The ranks of a replica end together: with the first.
            ends = [asyncio.ensure_future(_value(host.wait.remote())) for host in self._hosts]
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return max((end.result() for end in done), key=abs)
        except (RayError, RuntimeError, ValueError) as error:
            # Ray also says by these that something is gone, or that it is not there itself any more.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise OSError(f"Ray says: {reason}") from error

    async def _find_room(self) -> None:
        loop = asyncio.get_running_loop()
        begun, strategy, told = loop.time(), "", False
        while True:
            # Nodes come and go.
            best = ray_cluster.packing(self._bundle, self._size, await self._in_thread(ray_cluster.nodes))
            if best != strategy:
                strategy = best
                await self._in_thread(self._ask, strategy)
            if await self._in_thread(self._has_room):
                return
            waited = loop.time() - begun
            if waited > self._timeout:
                raise OSError(
                    f"the Ray cluster had no room for {self._demand()} in {self._timeout:g} s: add nodes (ray start "
                    "--address=HEAD:6379), or lower --replicas, --ray-cpus or --ray-gpus"
                )
            if waited > _SOON and not told:
                told = True
                logger.warning(
                    "replica %d waits for room in the Ray cluster, %g s at most: it takes %s, free: %s",
                    *(self._order.replica_id, self._timeout, self._demand(), await self._in_thread(ray_cluster.free)),
                )

    def _has_room(self) -> bool:
        found: bool = self._group.wait(_LOOK_SECONDS)
        return found

    def _demand(self) -> str:
        one = ray_cluster.describe(self._bundle)
        return one if self._size == 1 else f"{self._size} times {one}"

    def _ask(self, strategy: str) -> None:
        from ray.util import placement_group, remove_placement_group

        if self._group is not None:
            remove_placement_group(self._group)
        name = f"peft-dist replica {self._order.replica_id} epoch {self._order.epoch}"
        self._group = placement_group([self._bundle] * self._size, strategy=strategy, name=name)

    def _make_hosts(self) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor = ray.remote(RankHost)
        for rank in range(self._size):
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank)
            options = actor.options(
                num_cpus=self._bundle.get("CPU", 0),
                num_gpus=self._bundle.get("GPU", 0),
                # A replica that dies is another epoch, which the orchestrator decides on.
                max_restarts=0,
                scheduling_strategy=place,
            )
            self._hosts.append(options.remote(self._order))

    async def _clean_up(self) -> None:
        """End the processes, then their actors; only then is their room given to others."""
        if self._hosts:
            kills = [asyncio.ensure_future(_value(host.kill.remote())) for host in self._hosts]
            # Of a node that has died there is no answer, or a late one.
            await asyncio.wait(kills, timeout=_ANSWER_SECONDS)
            for kill in kills:
                kill.add_done_callback(_look)
        await self._in_thread(self._release)

    def _release(self) -> None:
        import ray
        from ray.exceptions import RayError
        from ray.util import remove_placement_group

        try:
            for host in self._hosts:
                ray.kill(host)
            if self._group is not None:
                remove_placement_group(self._group)
        except (RayError, RuntimeError, ValueError) as error:
            logger.warning("replica %d: Ray could not be told of its end: %s", self._order.replica_id, error)

    async def _in_thread(self, work: Callable[..., _T], *args: object) -> _T:
        """Do it to its end also when this is cancelled."""
        doing = asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        try:
            return await asyncio.shield(doing)
        except asyncio.CancelledError:
            await asyncio.wait([doing])
            raise


async def _value(ref: Any) -> Any:
    return await asyncio.wrap_future(ref.future())


def _discard(ref: Any) -> None:
    """Ask, and leave the answer."""
    asyncio.ensure_future(_value(ref)).add_done_callback(_look)


def _look(done: asyncio.Future[Any]) -> None:
    """What failed was of an actor that is gone, which its end tells."""
    if not done.cancelled():
        done.exception()
