"""A replica that joins an orchestrator, here or on another machine: ``peft-dist worker --join``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import zmq.asyncio

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.config import EngineConfig
from peft_dist.core.messages import AnyCommand, Join, Leave, Welcome, decode_command, encode_report
from peft_dist.core.waiting import unless
from peft_dist.worker.launcher import LAUNCHERS, LaunchedReplica
from peft_dist.worker.process import EXIT_FENCED

logger = logging.getLogger("peft_dist.worker")
_ASK_SECONDS = 1.0
_SHORTEST_WAIT, _LONGEST_WAIT = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class JoinSettings:
    """What ``peft-dist worker`` was asked for.

    Attributes:
        address: ``tcp://host:port`` of the orchestrator.
        key_file: Of its ``ClusterKeys``.
        engine: What this machine has otherwise, as fields of ``EngineConfig``.
        launcher: Name in ``LAUNCHERS``.
        silence: Seconds without a word of the orchestrator after which it counts as gone: the replica is ended, and
            asks to join again.
        leave_timeout: Seconds for running requests to move or finish when it leaves.
    """

    address: str
    key_file: Path | None
    engine: dict[str, object]
    launcher: str = "accelerate"
    silence: float = 10.0
    leave_timeout: float = 60.0
    log_level: str = "info"


async def join(settings: JoinSettings, stop: asyncio.Event) -> int:
    """Serve as one replica until ``stop`` is set or the orchestrator ends; returns the exit status.

    Raises:
        ConfigError: the keys cannot be used, or the options do not fit those of the orchestrator.
    """
    keys = None if settings.key_file is None else ClusterKeys.read(settings.key_file)
    async with _connected(settings.address, keys) as door:
        attempt = failures = 0
        while True:
            welcome = await unless(stop, door.ask(attempt))
            if welcome is None:
                return 0
            process = await _launch(settings, welcome)
            try:
                code = await _accompany(settings, door, welcome, process, stop)
            finally:
                process.kill()
                await process.wait()
            if code == 0 or stop.is_set():
                return 0
            failures = 0 if code == EXIT_FENCED else failures + 1
            wait = min(_SHORTEST_WAIT * 2**failures, _LONGEST_WAIT)
            logger.warning("replica %d ended with status %d: joining again in %g s", welcome.replica_id, code, wait)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), wait)
            attempt += 1


async def _launch(settings: JoinSettings, welcome: Welcome) -> LaunchedReplica:
    engine: EngineConfig = replace(welcome.engine, **settings.engine)  # type: ignore[arg-type]
    launcher = LAUNCHERS[settings.launcher](
        engine,
        log_level=settings.log_level,
        replica_factory=welcome.replica_factory,
        heartbeat_seconds=welcome.heartbeat_seconds,
        key_file=None if settings.key_file is None else str(settings.key_file),
    )
    logger.info("replica %d of %s: loading %s", welcome.replica_id, settings.address, engine.model)
    return await launcher.start(settings.address, welcome.replica_id, welcome.incarnation)


async def _accompany(
    settings: JoinSettings, door: _Door, welcome: Welcome, process: LaunchedReplica, stop: asyncio.Event
) -> int:
    """Wait for the end of the replica's process, which comes when it leaves, and when nobody is heard any more."""
    ended = asyncio.ensure_future(process.wait())
    silent = asyncio.ensure_future(door.silence(settings.silence))
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({ended, silent, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            if silent.done():
                logger.error("nothing was heard of %s for %g s: ending the replica", settings.address, settings.silence)
                process.kill()
            else:
                logger.info("replica %d leaves", welcome.replica_id)
                await door.leave(welcome)
                await asyncio.wait({ended}, timeout=settings.leave_timeout)
                process.kill()
        return await ended
    finally:
        for task in (silent, stopped):
            task.cancel()
        await asyncio.gather(silent, stopped, return_exceptions=True)


class _Door:
    """The socket by which one asks to join, and hears that the orchestrator lives."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket

    async def ask(self, attempt: int) -> Welcome:
        """Ask until there is an answer, however long that takes."""
        join = Join(host=socket.gethostname(), attempt=attempt)
        while True:
            await self._socket.send(encode_report(join, 0))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ASK_SECONDS):
                    return await self._welcome(attempt)

    async def leave(self, welcome: Welcome) -> None:
        """Say that this replica goes."""
        leave = Leave(replica_id=welcome.replica_id, incarnation=welcome.incarnation)
        await self._socket.send(encode_report(leave, 0))

    async def silence(self, seconds: float) -> None:
        """Return when nothing was heard for so long."""
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(seconds):
                    await self._hear()

    async def _welcome(self, attempt: int) -> Welcome:
        while True:
            message = await self._hear()
            # An earlier one may have been repeated.
            if isinstance(message, Welcome) and message.attempt == attempt:
                return message

    async def _hear(self) -> AnyCommand:
        return decode_command(await self._socket.recv()).message


@contextlib.asynccontextmanager
async def _connected(address: str, keys: ClusterKeys | None) -> AsyncIterator[_Door]:
    context = zmq.asyncio.Context()
    try:
        dealer = context.socket(zmq.SocketType.DEALER)
        dealer.set(zmq.SocketOption.IDENTITY, f"join.{uuid.uuid4().hex}".encode())
        # What was said to an orchestrator that does not hear must not reach the next one.
        dealer.set(zmq.SocketOption.IMMEDIATE, 1)
        if keys is not None:
            keys.connect(dealer)
        dealer.connect(address)
        yield _Door(dealer)
    finally:
        context.destroy(linger=1000)
