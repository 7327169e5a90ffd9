"""A replica that joins an orchestrator, here or on another machine: ``peft-dist worker --join``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import zmq.asyncio

from peft_dist.core.cluster_keys import ClusterKeys
from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.core.joining import Join, Leave, Welcome, host_of_address
from peft_dist.core.messages import AnyCommand, decode_command, encode_report
from peft_dist.core.restarts import RestartPolicy
from peft_dist.core.waiting import unless
from peft_dist.worker.kv_address import NOWHERE, of_guest
from peft_dist.worker.launcher import LAUNCHERS, LaunchedReplica
from peft_dist.worker.status import EXIT_FENCED, EXIT_ORPHANED, EXIT_REFUSED

logger = logging.getLogger("peft_dist.worker")
_ASK_SECONDS = 1.0
# Until whoever waits for an answer says so, and again.
_TELL_SECONDS = (5.0, 60.0)


@dataclass(frozen=True, slots=True)
class JoinSettings:
    """What ``peft-dist worker`` was asked for.

    Attributes:
        address: ``tcp://host:port`` of the orchestrator.
        key_file: Of its ``ClusterKeys``.
        engine: What this machine has otherwise, as fields of ``EngineConfig``.
        launcher: Name in ``LAUNCHERS``.
        kv_endpoint: Where replicas of other hosts read this one's KV, such as "tcp://10.0.0.5:*"; "none": nowhere, nor
            does it read theirs; None: at the address of this host on the way to the orchestrator.
        silence: Seconds without a word of the orchestrator after which it counts as gone: the replica drops its
            requests, and waits for another one with its model and adapters.
        orphan_timeout: Seconds that it waits; then it is ended, and asks to join.
        restart: When a replica that ended otherwise than it was told asks to join again, and when no more.
        leave_timeout: Seconds for running requests to move or finish when it leaves.
    """

    address: str
    key_file: Path | None
    engine: dict[str, object]
    launcher: str = "accelerate"
    kv_endpoint: str | None = None
    silence: float = 10.0
    orphan_timeout: float = 60.0
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    leave_timeout: float = 60.0
    log_level: str = "info"


async def join(settings: JoinSettings, stop: asyncio.Event) -> int:
    """Serve as one replica until ``stop`` is set, the orchestrator ends, or the replica died too often.

    Returns the exit status: 0, or the last one of the replica where it ended otherwise than it was asked to.

    Raises:
        ConfigError: the keys cannot be used, or the options do not fit those of the orchestrator.
    """
    keys = None if settings.key_file is None else ClusterKeys.read(settings.key_file)
    async with _connected(settings.address, keys) as door:
        attempt = failures = 0
        clock = asyncio.get_running_loop().time
        while True:
            welcome = await unless(stop, _admission(settings, door, attempt))
            if welcome is None:
                return 0
            process, began = await _launch(settings, welcome, door.name), clock()
            try:
                code = await _accompany(settings, door, welcome, process, stop)
            finally:
                process.kill()
                await process.wait()
            if code == 0 or stop.is_set():
                return code if code >= 0 else 128 - code
            if code == EXIT_REFUSED:
                # The next one would have the same files. Why stands in the replica's log, above.
                logger.error("the server takes no replica with what lies here: not joining again")
                return code
            # One that was given up, or waited for nobody, did not fail.
            is_well = code in (EXIT_FENCED, EXIT_ORPHANED)
            failures = 0 if is_well else settings.restart.failures(failures, clock() - began)
            wait = settings.restart.first if is_well else settings.restart.wait(failures)
            if wait is None:
                logger.error("the replica ended %d times soon after it had begun: giving up", failures)
                return code if code >= 0 else 128 - code
            logger.warning("replica %d ended with status %d: joining again in %g s", welcome.replica_id, code, wait)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), wait)
            attempt += 1


async def _admission(settings: JoinSettings, door: _Door, attempt: int) -> Welcome:
    """As ``_Door.ask``, telling the log that there is no answer."""
    asking, wait = asyncio.ensure_future(door.ask(attempt)), _TELL_SECONDS[0]
    try:
        while not (await asyncio.wait({asking}, timeout=wait))[0]:
            logger.warning(
                "no answer from %s yet: a server must listen there (--listen) with the same --cluster-key (here: %s)",
                settings.address,
                settings.key_file or "none",
            )
            wait = _TELL_SECONDS[1]
        return await asking
    finally:
        asking.cancel()


async def _launch(settings: JoinSettings, welcome: Welcome, name: str) -> LaunchedReplica:
    engine: EngineConfig = replace(welcome.engine, **settings.engine)  # type: ignore[arg-type]
    launcher = LAUNCHERS[settings.launcher](
        engine,
        log_level=settings.log_level,
        replica_factory=welcome.replica_factory,
        heartbeat_seconds=welcome.heartbeat_seconds,
        key_file=None if settings.key_file is None else str(settings.key_file),
        further={
            "silence": settings.silence,
            "orphan_timeout": settings.orphan_timeout,
            "guest": name,
            "attempt": welcome.attempt,
            "told": welcome.engine,
            "kv_endpoint": _kv_endpoint(settings),
        },
    )
    logger.info("replica %d of %s: loading %s", welcome.replica_id, settings.address, engine.model)
    return await launcher.start(settings.address, welcome.replica_id, welcome.incarnation)


def _kv_endpoint(settings: JoinSettings) -> str | None:
    if settings.kv_endpoint is None:
        return of_guest(settings.address, has_keys=settings.key_file is not None)
    return None if settings.kv_endpoint == NOWHERE else settings.kv_endpoint


async def _accompany(
    settings: JoinSettings, door: _Door, welcome: Welcome, process: LaunchedReplica, stop: asyncio.Event
) -> int:
    """Wait for the end of the replica's process, which comes when it leaves, and when it waited long for nobody.

    Returns its status; 0 when it was to leave and no orchestrator was there to let it go.
    """
    ended = asyncio.ensure_future(process.wait())
    await unless(stop, asyncio.wait({ended}))
    if ended.done():
        return await ended
    logger.info("the replica leaves")
    leaving = asyncio.ensure_future(door.leave(welcome.attempt))
    silent = asyncio.ensure_future(door.silence(settings.silence))
    await asyncio.wait({ended, silent}, timeout=settings.leave_timeout, return_when=asyncio.FIRST_COMPLETED)
    is_alone = silent.done() and not ended.done()
    for task in (leaving, silent):
        task.cancel()
    await asyncio.gather(leaving, silent, return_exceptions=True)
    process.kill()
    status = await ended
    return 0 if is_alone else status


class _Door:
    """The socket by which one asks to join, and to leave. Orchestrators know it by its name."""

    def __init__(self, socket: zmq.asyncio.Socket, name: str) -> None:
        self._socket = socket
        self.name = name

    async def ask(self, attempt: int) -> Welcome:
        """Ask until there is an answer, however long that takes."""
        host, message = socket.gethostname(), None
        while True:
            join = Join(host=host, attempt=attempt, is_heard=message is not None)
            await self._say(join)
            message = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ASK_SECONDS):
                    message = await self._hear()
            # An earlier one may have been repeated.
            if isinstance(message, Welcome) and message.attempt == attempt:
                return message

    async def leave(self, attempt: int) -> None:
        """Say that this replica goes, until somebody cancels it: the orchestrator may be another one by now."""
        while True:
            await self._say(Leave(attempt=attempt))
            await asyncio.sleep(_ASK_SECONDS)

    async def silence(self, seconds: float) -> None:
        """Return when nothing was heard for so long."""
        with contextlib.suppress(TimeoutError):
            while True:
                async with asyncio.timeout(seconds):
                    await self._hear()

    async def _say(self, message: Join | Leave) -> None:
        # A connection can go between being there and being used. What is said here is said again until it is answered.
        with contextlib.suppress(zmq.Again):
            await self._socket.send(encode_report(message, 0))

    async def _hear(self) -> AnyCommand:
        return decode_command(await self._socket.recv()).message


@contextlib.asynccontextmanager
async def _connected(address: str, keys: ClusterKeys | None) -> AsyncIterator[_Door]:
    host_of_address(address, "--join ", "tcp://server:5600")
    context = zmq.asyncio.Context()
    try:
        dealer = context.socket(zmq.SocketType.DEALER)
        name = uuid.uuid4().hex
        dealer.set(zmq.SocketOption.IDENTITY, f"join.{name}".encode())
        # What was said to an orchestrator that does not hear must not reach the next one.
        dealer.set(zmq.SocketOption.IMMEDIATE, 1)
        if keys is not None:
            keys.connect(dealer)
        try:
            dealer.connect(address)
        except zmq.ZMQError as error:
            raise ConfigError(f"--join {address!r} cannot be used: {error}") from error
        yield _Door(dealer, name)
    finally:
        context.destroy(linger=1000)
