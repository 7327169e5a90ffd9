"""The worker's loop: commands in, engine steps, reports out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.collector import freeze_heap
from peft_dist.core.errors import PeftDistError, UnfitAdapterError
from peft_dist.core.joining import Welcome
from peft_dist.core.messages import (
    AdapterResult,
    AnyCommand,
    Fence,
    LoadAdapter,
    PinAdapter,
    Ping,
    Shutdown,
    UnloadAdapter,
    Warmth,
)
from peft_dist.core.succession import Adopt, DrainKept, Identify, KeepDrained, NameAdapters, NamesKept
from peft_dist.engine.driver import EngineDriver
from peft_dist.worker.allegiance import Allegiance
from peft_dist.worker.channel import Channel
from peft_dist.worker.fetcher import AdapterFetcher
from peft_dist.worker.idle_work import IdleWork
from peft_dist.worker.replica import Replica

logger = logging.getLogger(__name__)


class WorkerLoop:
    """Runs one replica for an orchestrator until it says Shutdown.

    While the engine has work, commands are taken between two steps without waiting; without work the loop
    waits for the next command or the end of a load, or until what changed last is to be told. Where it would wait
    without any work it lets the replica warm up, as ``IdleWork`` says.
    """

    def __init__(
        self,
        replica: Replica,
        channel: Channel,
        find_adapter: Callable[[LoadAdapter], Path],
        clock: Callable[[], float] = time.monotonic,
        allegiance: Allegiance | None = None,
    ) -> None:
        """``clock``: Seconds from any origin, never running backwards. ``allegiance``: None of what is never told."""
        self._replica = replica
        self._engine = replica.engine
        self._driver = EngineDriver(replica.engine, replica.handovers, channel.send, clock)
        self._idle_work = IdleWork(replica.warm_up_some, replica.lacks_warm_up, clock, self._tell_warmth)
        self._channel = channel
        self._find = find_adapter
        self._fetcher = AdapterFetcher(self._inspect, replica.load_timeout)
        self._channel.watch(self._fetcher.fileno())
        self._channel.watch(replica.fileno())
        self._channel.watch(replica.handovers.fileno())
        self._stopped = False
        self.is_fenced = self.is_refused = False
        self._allegiance = allegiance

    def run(self) -> None:
        """Raises whatever makes the engine unable to go on."""
        # Model and libraries live as long as this process. Left to the collector, they would stop all threads for a
        # quarter of a second whenever enough requests and adapters have come and gone.
        freeze_heap()
        while True:
            if self._driver.is_idle and (self._engine.has_work or not self._idle_work.go_on()):
                self._rest()
            if self._allegiance is not None:
                self._allegiance.begin_round()
            commands = self._channel.receive()
            for command in commands:
                self._handle(command)
            if self._allegiance is not None and self._allegiance.hear(len(commands)):
                self._driver.drop_requests()
            found = self._fetcher.take_found()
            for load in found:
                self._finish_load(*load)
            if self._stopped:
                return
            has_news, has_work = bool(commands or found), self._engine.has_work
            self._driver.step(report=has_news)
            self._idle_work.note(worked=has_work, changed=has_news)

    def _rest(self) -> None:
        timeout_ms = self._driver.timeout_ms()
        if not self._engine.has_work:
            timeout_ms = self._idle_work.limit(timeout_ms)
        if self._allegiance is not None:
            self._allegiance.rest()
            timeout_ms = self._allegiance.limit(timeout_ms)
        self._channel.wait(timeout_ms)

    def _handle(self, command: AnyCommand) -> None:
        match command:
            case LoadAdapter():
                self._fetcher.start(command)
            case PinAdapter(name=name, content_hash=content_hash):
                self._driver.handle(command)
                self._note_pin(name, pinned=content_hash is not None)
            case UnloadAdapter():
                self._driver.adapters.pop(command.content_hash, None)
                self._engine.forget_adapter(command.content_hash)
                self._channel.send(AdapterResult(call_id=command.call_id))
            case Shutdown():
                self._stopped = True
            case Fence(reason=reason, is_final=is_final):
                # One that was let go before it hears this, because a sign of life crossed the farewell, ended well.
                if not self._stopped:
                    self.is_fenced, self.is_refused = True, is_final
                    logger.error("the server goes on without this replica: %s", reason or "it has been given up")
                self._stopped = True
            case NameAdapters() | KeepDrained() | Identify() | Adopt():
                self._serve_another(command)
            case Ping() | Welcome():
                """That it came is all there is to it; the other is for who asked to join."""
            case _:
                self._driver.handle(command)

    def _serve_another(self, command: NameAdapters | KeepDrained | Identify | Adopt) -> None:
        """What concerns an orchestrator after this one, or is said by it."""
        if self._allegiance is None:
            return
        match command:
            case NameAdapters():
                self._allegiance.remember(command)
                self._channel.send(NamesKept(version=command.version))
            case KeepDrained():
                self._allegiance.keep_drained(command)
                self._channel.send(DrainKept())
            case Identify():
                self._driver.drop_requests()
                self._allegiance.identify()
            case Adopt() if not self._allegiance.follows(command):
                self._driver.drop_requests()
                self._driver.tell_anew()
                self._allegiance.follow(command, self._replica, self._driver.adapters.values())
                self._idle_work.tell_anew()

    def _tell_warmth(self, is_warm: bool, pause: float) -> None:
        self._channel.send(Warmth(is_warm=is_warm, pause=pause))

    def _note_pin(self, name: str, *, pinned: bool) -> None:
        if self._allegiance is not None:
            self._allegiance.note_pin(name, pinned=pinned)

    def _inspect(self, command: LoadAdapter) -> AdapterSpec:
        """Runs on a thread of the fetcher, beside the engine's steps."""
        path = self._find(command)
        return self._replica.inspect_adapter(command.name, path, allow_pickle=command.allow_pickle)

    def _finish_load(self, command: LoadAdapter, found: AdapterSpec | Exception) -> None:
        try:
            if isinstance(found, Exception):
                raise found
            spec = found
            pinned = command.pinned if self._allegiance is None else self._allegiance.pins(command)
            self._replica.register_adapter(spec, allow_pickle=command.allow_pickle, pinned=pinned)
        except Exception as error:  # No adapter, however broken, may end the serving of the others.
            if not isinstance(error, PeftDistError):
                logger.exception("loading adapter %r failed", command.name)
                # With a broken device there are no others to serve.
                self._replica.check_device()
            is_final = isinstance(error, UnfitAdapterError)
            self._channel.send(AdapterResult(call_id=command.call_id, error=describe(error), is_final=is_final))
        else:
            self._driver.adapters[spec.content_hash] = spec
            self._note_pin(spec.name, pinned=pinned)
            self._idle_work.expect_more()
            self._channel.send(AdapterResult(call_id=command.call_id, spec=spec))


def describe(error: BaseException) -> str:
    """An error in one message: our own speak for themselves, others need their type."""
    return str(error) if isinstance(error, PeftDistError) else f"{type(error).__name__}: {error}"
