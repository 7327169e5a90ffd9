"""The asyncio service around the Orchestrator: sockets, the clock, and the replicas' processes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable
from typing import Any

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import ModelInfo
from peft_dist.core.errors import PeftDistError, ReplicaStateError
from peft_dist.core.messages import ProtocolError, ReplicaStats, decode_report
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.link import Link
from peft_dist.orchestrator.observation import ReplicaView
from peft_dist.orchestrator.processes import Processes
from peft_dist.orchestrator.records import (
    AdapterLoaded,
    AdapterRefused,
    Event,
    Notice,
    Outgoing,
    ReplicaDrained,
    ReplicaLost,
    ReplicaReady,
    RequestFailed,
    SequenceEvent,
    StartReplica,
)
from peft_dist.orchestrator.replica_process import ReplicaLauncher
from peft_dist.orchestrator.streams import Stream
from peft_dist.orchestrator.timer import Timer

logger = logging.getLogger(__name__)
_GRACE_WHILE_STARTING = 1.0
# What a busy loop may be late for a deadline without anything being wrong with it.
_PAUSE = 0.5


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
    ) -> None:
        """``start_timeout`` and ``stop_grace`` are the seconds a replica gets to become ready, and to end."""
        self._loop = asyncio.get_running_loop()
        self._core = Orchestrator(options)
        self._link = Link()
        self._processes = Processes(launcher, self._link.endpoint)
        self._num_replicas = num_replicas
        self._start_timeout = start_timeout
        self._stop_grace = stop_grace
        self._streams: dict[str, Stream] = {}
        self._calls: dict[int, asyncio.Future[AdapterSpec]] = {}
        self._drains: dict[int, list[asyncio.Future[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._timer = Timer(self._tick)
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the replicas and return when all are ready. Call ``stop`` also when this fails.

        Raises:
            EngineDeadError: one failed to start, in its own words, or was not ready within ``start_timeout``.
        """
        self._spawn(self._receive())
        for replica_id in range(self._num_replicas):
            replica = self._core.add_replica(replica_id, self._now(), self._start_timeout)
            await self._processes.start(replica_id, replica.epoch)
            self._spawn(self._supervise(replica_id, replica.epoch))
        self._timer.arm(self._core.next_deadline())
        await asyncio.shield(self._ready)

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

    def generate(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, model: str | None
    ) -> Stream:
        """Admit a request and return its stream. Raises what ``Orchestrator.submit`` raises."""
        new = NewRequest(request_id, prompt_token_ids, params, model)
        commands = self._core.submit(new, self._now())
        stream = Stream(params.n, lambda: self._abandon(request_id))
        self._streams[request_id] = stream
        self._idle.clear()
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
        future: asyncio.Future[AdapterSpec] = self._loop.create_future()
        self._calls[call_id] = future
        self._act(commands)
        return await future

    async def unload_adapter(self, name: str) -> None:
        """As in ``EngineClient``."""
        self._act(self._core.unload_adapter(name))

    def stats(self) -> ReplicaStats:
        """The last report of a ready replica, or of the last known one when none is ready."""
        return self._core.stats()

    def replicas(self) -> list[ReplicaView]:
        return self._core.replicas.views()

    def replica_pids(self) -> dict[int, int]:
        """Process id of each ready replica's rank 0."""
        return {r.replica_id: r.pid for r in self._core.replicas.ready() if r.pid is not None}

    async def drain_replica(self, replica_id: int, *, restart: bool = False) -> None:
        """As in ``EngineClient``."""
        drained: asyncio.Future[None] = self._loop.create_future()
        waiting = self._drains.setdefault(replica_id, [])
        waiting.append(drained)
        try:
            self._act(self._core.drain_replica(replica_id, self._now(), restart=restart))
            await drained
        finally:
            if drained in waiting:
                waiting.remove(drained)

    def resume_replica(self, replica_id: int) -> None:
        """As in ``EngineClient``."""
        self._act(self._core.resume_replica(replica_id, self._now()))
        self._end_drain(replica_id, ReplicaStateError(f"replica {replica_id} was resumed"))

    def move_request(self, request_id: str, replica_id: int, *, with_kv: bool | None = None) -> None:
        """As ``Handover.move``."""
        self._act(self._core.handover.move(request_id, replica_id, self._now(), with_kv=with_kv))

    async def drain(self, timeout: float) -> bool:
        """Admit nothing any more and wait for what runs; False when ``timeout`` seconds were not enough."""
        self._core.drain()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Fail what still runs and end the replicas. Idempotent; every caller waits for the end."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    # Inside

    async def _stop(self) -> None:
        self._timer.cancel()
        self._act(self._core.shut_down())
        await self._processes.stop_all(self._grace())
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._link.close()

    def _grace(self) -> float:
        """A replica that never was ready may be stuck in loading, and has nothing to finish."""
        was_ready = self._ready.done() and self._ready.exception() is None
        return self._stop_grace if was_ready else min(self._stop_grace, _GRACE_WHILE_STARTING)

    def _now(self) -> float:
        return self._loop.time()

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
            replica_id, epoch, data = await self._link.receive()
            try:
                envelope = decode_report(data)
            except ProtocolError as error:
                reason = f"Replica {replica_id} cannot be understood: {error}"
                self._act(self._core.lose_replica(replica_id, epoch, reason, self._now()))
            else:
                self._act(self._core.observe(replica_id, envelope.epoch, envelope.message, self._now()))

    async def _supervise(self, replica_id: int, epoch: int) -> None:
        end = await self._processes.end(replica_id)
        self._act(self._core.lose_replica(replica_id, epoch, f"Replica {replica_id} {end}.", self._now()))

    async def _restart(self, replica_id: int, epoch: int) -> None:
        try:
            await self._processes.restart(replica_id, epoch)
        except OSError as error:
            reason = f"Replica {replica_id} could not be started: {error}"
            self._act(self._core.lose_replica(replica_id, epoch, reason, self._now()))
        else:
            await self._supervise(replica_id, epoch)

    def _tick(self, lateness: float) -> None:
        """``lateness``: Seconds for which this process did not come to it: others may have spoken meanwhile."""
        if lateness > _PAUSE:
            self._core.lives.excuse_silence(self._now())
        self._act(self._core.tick(self._now()))

    def _abandon(self, request_id: str) -> None:
        self._drop_stream(request_id)
        self.abort(request_id)

    def _drop_stream(self, request_id: str) -> Stream | None:
        stream = self._streams.pop(request_id, None)
        if not self._streams:
            self._idle.set()
        return stream

    def _act(self, commands: Iterable[Outgoing]) -> None:
        for out in commands:
            self._link.send(out)
        events = self._core.drain_events()
        for event in events:
            self._deliver(event)
        if any(not isinstance(event, SequenceEvent) for event in events) or not self._timer.is_armed:
            self._timer.arm(self._core.next_deadline())

    def _deliver(self, event: Event) -> None:
        match event:
            case SequenceEvent(request_id, index, progress):
                stream = self._streams.get(request_id)
                if stream is not None and stream.put(index, progress):
                    self._drop_stream(request_id)
            case RequestFailed(request_id, error):
                stream = self._drop_stream(request_id)
                if stream is not None:
                    stream.fail(error)
            case AdapterLoaded(call_id, spec):
                self._answer(call_id, spec)
            case AdapterRefused(call_id, error):
                self._answer(call_id, error)
            case ReplicaReady():
                if not self._ready.done() and len(self._core.replicas.ready()) == self._num_replicas:
                    self._ready.set_result(None)
            case ReplicaLost():
                self._lost(event)
            case StartReplica(replica_id, epoch):
                self._spawn(self._restart(replica_id, epoch))
            case ReplicaDrained(replica_id, leaves):
                self._end_drain(replica_id, None)
                if leaves:
                    self._spawn(self._processes.stop(replica_id, self._grace()))
            case Notice(replica_id, text):
                logger.warning("replica %d: %s", replica_id, text)

    def _answer(self, call_id: int, answer: AdapterSpec | PeftDistError) -> None:
        call = self._calls.pop(call_id)
        if call.done():
            return  # Whoever asked was cancelled.
        if isinstance(answer, AdapterSpec):
            call.set_result(answer)
        else:
            call.set_exception(answer)

    def _lost(self, lost: ReplicaLost) -> None:
        if lost.was_asked:
            logger.info("replica %d has ended and is started again", lost.replica_id)
        else:
            logger.error("replica %d is lost: %s", lost.replica_id, lost.error)
        if lost.hangs:
            self._processes.kill(lost.replica_id)
        else:
            self._spawn(self._processes.stop(lost.replica_id, self._grace()))
        self._end_drain(lost.replica_id, None)
        if not self._ready.done():
            self._ready.set_exception(lost.error)

    def _end_drain(self, replica_id: int, error: PeftDistError | None) -> None:
        """A replica is empty, for whatever reason, or will not be."""
        for waiting in self._drains.pop(replica_id, []):
            if waiting.done():
                continue  # Whoever asked was cancelled.
            if error is None:
                waiting.set_result(None)
            else:
                waiting.set_exception(error)
