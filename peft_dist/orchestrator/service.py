"""The asyncio service around the Orchestrator: sockets, the clock, and the replicas' processes."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine, Iterable, Mapping
from functools import partial
from typing import Any

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import ModelInfo
from peft_dist.core.errors import ReplicaStateError
from peft_dist.core.messages import ReplicaStats
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.succession import life_of
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import OrchestratorOptions
from peft_dist.orchestrator.events import (
    AdapterLoaded,
    AdapterRefused,
    DrainIsKept,
    Event,
    NamesAreKept,
    Notice,
    PlacementDue,
    PlanDue,
    ReplicaDrained,
    ReplicaLost,
    ReplicaReady,
    ReplicaRenewed,
    RequestFailed,
    StartReplica,
)
from peft_dist.orchestrator.guests import Guests, Invitation
from peft_dist.orchestrator.hearing import Hearing
from peft_dist.orchestrator.keeper import Keeper
from peft_dist.orchestrator.link import Link
from peft_dist.orchestrator.observation import MigrationView, ReplicaView
from peft_dist.orchestrator.processes import Processes
from peft_dist.orchestrator.promises import Promises
from peft_dist.orchestrator.rebalancer import Rebalancer
from peft_dist.orchestrator.recorded import make_orchestrator
from peft_dist.orchestrator.records import Outgoing
from peft_dist.orchestrator.renewals import Renewals
from peft_dist.orchestrator.replica_process import ReplicaLauncher, ReplicaProcess
from peft_dist.orchestrator.rolling import RollingRestart
from peft_dist.orchestrator.startup import Startup
from peft_dist.orchestrator.streams import Stream, StreamTable
from peft_dist.orchestrator.survivors import Survivors
from peft_dist.orchestrator.timer import Pulse, Timer
from peft_dist.placement.planner import Planner

logger = logging.getLogger(__name__)


class EngineService:
    """An ``EngineClient`` over replicas in processes of their own. Lives on one event loop.

    Sending never waits: the queue bound of the Orchestrator limits what can be under way.
    """

    def __init__(
        self,
        launcher: ReplicaLauncher,
        options: OrchestratorOptions,
        *,
        num_replicas: int = 1,
        start_timeout: float | None = None,
        stop_grace: float = 10.0,
        planner_limit: float = 0.2,
        invitation: Invitation | None = None,
        link: Link | None = None,
        left: Mapping[int, ReplicaProcess] | None = None,
    ) -> None:
        """Seconds: ``start_timeout`` and ``stop_grace`` a replica gets to become ready, and to end; ``planner_limit``
        from a look at requests to a plan of which ones move. ``invitation``: To replicas that others start. ``link``:
        For the replicas of ``launcher``, closed by ``stop``; one for this host alone if there is none. ``left``: Those
        that run already, and reach this service by it.

        Raises:
            ConfigError: the invitation's address cannot be used, or the recording that was asked for cannot be made.
        """
        self._now = asyncio.get_running_loop().time
        options = options.for_a_life(by_network=link is not None and link.can_lose)
        self._core = make_orchestrator(options, finds_replicas=bool(left))
        self._num_replicas = num_replicas
        self._start_timeout = start_timeout
        self._take = Hearing(self._core, self._act, self._now).take
        self.guests = Guests(invitation, self._core, self._act, self._take, self._now) if invitation else None
        self._link = link or Link.local()
        self._survivors = Survivors(self._core, self._link, self._now, start_timeout)
        # Of one elsewhere there is nothing to watch.
        pid = None if self._link.can_lose else os.getpid()
        self._renewals = Renewals(self._core, self._link.answer, self._now, pid=pid)
        self._processes = Processes(launcher, self._link.endpoint, left or {})
        self._streams = StreamTable(self.abort, self._core.room.keep_unread)
        self._promises = Promises()
        self._rebalancer = Rebalancer(self._core.migration, self._act, self._now, Planner(planner_limit))
        self.rolling = RollingRestart(self._core, self._act, self._now)
        self._tasks: set[asyncio.Task[None]] = set()
        self._startup = Startup(num_replicas, left or {}, stop_grace)
        parts = self._processes, self._renewals, self.guests, self._promises, self._startup
        self._keeper = Keeper(self._core, *parts, self._act, self._spawn, self._now)
        # Others may have spoken while this process did not listen.
        self._pulse = Pulse(lambda: self._core.lives.excuse_silence(self._now()))
        self._timer = Timer(self._tick, self._pulse)
        self._stopping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when all replicas are ready, or one that joined, or those that were left; ``stop`` also on an error.

        Raises:
            EngineDeadError: one failed to start, in its own words, or was not ready within ``start_timeout``.
        """
        # All of them before anybody is heard: whoever was left would be a stranger, and a guest might take an id.
        ids, left = range(self._num_replicas), self._processes
        enter = partial(self._core.add_replica, now=self._now(), start_timeout=self._start_timeout)
        entered = [self._survivors.expect(each) if each in left else enter(each) for each in ids]
        self._spawn(self._receive())
        self._spawn(self._link.keep_pinging(self._core.replicas.all_alive))
        if self.guests is not None:
            self._spawn(self.guests.run())
        for replica in entered:
            if not replica.is_survivor:
                await self._processes.start(replica.replica_id, replica.epoch)
            self._spawn(self._keeper.supervise(replica.replica_id, replica.epoch))
        self._timer.arm(self._core.next_deadline())
        await self._startup.wait()

    # EngineClient

    @property
    def model(self) -> ModelInfo:
        """The served model."""
        return self._core.model

    @property
    def is_healthy(self) -> bool:
        """Whether requests can be served now."""
        return self._core.health_error is None

    @property
    def health_error(self) -> str | None:
        """Why no request can be served now, or None."""
        return self._core.health_error

    def adapters(self) -> list[AdapterSpec]:
        """The adapters that requests can name."""
        return self._core.adapters.specs()

    def pinned_adapters(self) -> frozenset[str]:
        """Names of those that stay on the device."""
        return self._core.adapters.pinned

    def resolve(self, name: str | None) -> AdapterSpec | None:
        """The adapter of a name; None for the base. Raises UnknownModelError for any other."""
        return self._core.adapters.resolve(name)

    def check_room(self, num_sequences: int, param: str) -> None:
        """As in ``EngineClient``."""
        self._core.room.check_count(num_sequences, param)

    def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, model: str | None
    ) -> Stream:
        """Admit a request and return its stream. Raises what ``Orchestrator.submit`` raises."""
        new = NewRequest(request_id, prompt_token_ids, params, model)
        commands = self._core.submit(new, self._now())
        stream = self._streams.open(request_id, params.n)
        self._act(commands)
        return stream

    def abort(self, request_id: str, sequence_index: int | None = None) -> None:
        """End a request, or one of its sequences. Nothing happens when it has ended."""
        self._act(self._core.abort(request_id, self._now(), sequence_index))

    async def load_adapter(
        self,
        name: str,
        path: str,
        *,
        replace: bool = False,
        allow_hub: bool = False,
        root: str | None = None,
        allow_pickle: bool = False,
        pinned: bool | None = None,
    ) -> AdapterSpec:
        """As in ``EngineClient``."""
        call_id, commands = self._core.load_adapter(
            name, path, replace=replace, allow_hub=allow_hub, root=root, allow_pickle=allow_pickle, pinned=pinned
        )
        loaded = self._promises.load(call_id)
        self._act(commands)
        spec = await loaded
        await self._promises.kept(self._core.adapters.version)
        return spec

    async def unload_adapter(self, name: str) -> None:
        """As in ``EngineClient``."""
        self._act(self._core.unload_adapter(name))
        await self._promises.kept(self._core.adapters.version)

    def has_adapter(self, name: str, path: str, **source: Any) -> bool:
        """As ``AdapterRegistry.is_named_from``: of what an earlier service had loaded."""
        return self._core.adapters.is_named_from(name, path, **source)

    def stats(self) -> ReplicaStats:
        """The last report of a ready replica, or of the last known one when none is ready."""
        return self._core.stats()

    @property
    def num_unread(self) -> int:
        return self._core.room.num_unread

    def replicas(self) -> list[ReplicaView]:
        return self._core.replicas.views()

    def migration(self) -> MigrationView | None:
        return self._core.migration.view()

    def replica_pids(self) -> dict[int, int]:
        """Process id of each ready replica's rank 0."""
        return {r.replica_id: r.pid for r in self._core.replicas.ready() if r.pid is not None}

    async def drain_replica(self, replica_id: int, *, restart: bool = False) -> None:
        """As in ``EngineClient``."""
        drained = self._promises.drain(replica_id)
        try:
            self._act(self._core.drain_replica(replica_id, self._now(), restart=restart))
            await drained
        finally:
            self._promises.forget_drain(replica_id, drained)
        if not restart:
            await self.drain_kept(replica_id)
            self._core.lives.check_drained(replica_id)

    async def drain_kept(self, replica_id: int) -> None:
        """As in ``EngineClient``."""
        replica = self._core.replicas.get(replica_id)
        if replica is not None and replica.is_alive and replica.num_drains_kept < replica.num_drains_told:
            await self._promises.drain_kept(replica_id)

    def resume_replica(self, replica_id: int) -> None:
        """As in ``EngineClient``."""
        self._act(self._core.resume_replica(replica_id, self._now()))
        # It is no event, and with it plans are due again.
        self._timer.arm(self._core.next_deadline())
        self._promises.end_drain(replica_id, ReplicaStateError(f"replica {replica_id} was resumed"))

    def move_request(self, request_id: str, replica_id: int, *, with_kv: bool | None = None) -> None:
        """As ``Handover.move``."""
        self._act(self._core.handover.move(request_id, replica_id, self._now(), with_kv=with_kv))

    async def drain(self, timeout: float) -> bool:
        """Admit nothing any more and wait for what runs; False when ``timeout`` seconds were not enough."""
        self._core.drain()
        return await self._streams.wait_until_empty(timeout)

    async def stop(self) -> None:
        """Fail what still runs and end the replicas. Idempotent; every caller waits for the end."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    # Inside

    async def _stop(self) -> None:
        self._timer.cancel()
        self._pulse.stop()
        await self._rebalancer.stop()
        self._act(self._core.shut_down())
        await self._processes.stop_all(self._startup.grace)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._link.close()
        if self.guests is not None:
            self.guests.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        # Without this task nothing would ever answer the streams again.
        logger.error("a task of the orchestrator failed", exc_info=error)
        self._core.lives.stop_restarts()
        for replica in self._core.replicas.all_alive():
            reason = f"The orchestrator failed: {type(error).__name__}: {error}"
            self._act(self._core.lose_replica(replica.replica_id, replica.epoch, reason, self._now()))

    async def _receive(self) -> None:
        while True:
            received = await self._link.receive()
            if life_of(received.epoch) != self._core.life:
                self._act(self._survivors.hear(received))
            elif self._renewals.awaits(received):
                self._act(self._renewals.hear(received))
            elif received.replica_id is not None:
                self._take(received.replica_id, received.epoch, received.data)

    def _tick(self) -> None:
        self._act(self._core.tick(self._now()))

    def _act(self, commands: Iterable[Outgoing]) -> None:
        for out in commands:
            if self.guests is None or not self.guests.sends(out):
                self._link.send(out)
        others = self._streams.put_all(self._core.drain_events())
        for event in others:
            self._deliver(event)
        if others or not self._timer.is_armed:
            self._timer.arm(self._core.next_deadline())
        self.rolling.look()

    def _deliver(self, event: Event) -> None:
        match event:
            case RequestFailed(request_id, error):
                self._streams.fail(request_id, error)
            case AdapterLoaded(call_id, answer) | AdapterRefused(call_id, answer):
                self._promises.answer(call_id, answer)
            case NamesAreKept(version):
                self._promises.keep(version)
            case DrainIsKept(replica_id):
                self._promises.keep_drain(replica_id)
            case ReplicaReady(replica_id):
                self._keeper.ready(replica_id)
            case ReplicaLost():
                self._keeper.lost(event)
            case ReplicaRenewed():
                self._keeper.renewed(event)
            case StartReplica(replica_id, epoch):
                self._spawn(self._keeper.restart(replica_id, epoch))
            case ReplicaDrained(replica_id, leaves):
                self._keeper.drained(replica_id, leaves=leaves)
            case PlanDue() | PlacementDue():
                self._rebalancer.begin(event)
            case Notice(replica_id, text):
                logger.warning("replica %d: %s", replica_id, text)
