"""The worker's loop: commands in, engine steps, reports out."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from pathlib import Path

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import PeftDistError
from peft_dist.core.messages import (
    AbortRequest,
    AdapterResult,
    AddRequest,
    AnyCommand,
    EndExport,
    ExportRequests,
    Fence,
    Imported,
    ImportRequests,
    LoadAdapter,
    PinAdapter,
    Ping,
    Progress,
    SequenceProgress,
    Shutdown,
    Started,
    UnloadAdapter,
    Welcome,
)
from peft_dist.core.succession import Adopt, Identify, NameAdapters, NamesKept
from peft_dist.engine.commands import make_request
from peft_dist.engine.detail_schedule import DetailSchedule
from peft_dist.worker.allegiance import Allegiance
from peft_dist.worker.channel import Channel
from peft_dist.worker.fetcher import AdapterFetcher
from peft_dist.worker.replica import Replica

logger = logging.getLogger(__name__)


class WorkerLoop:
    """Runs one replica for an orchestrator until it says Shutdown.

    While the engine has work, commands are taken between two steps without waiting; without work the loop
    waits for the next command or the end of a load, or until what changed last is to be told. Before it waits without
    any work it lets the replica warm up, a little at a time.
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
        self._clock = clock
        self._engine = replica.engine
        self._handovers = replica.handovers
        self._channel = channel
        self._find = find_adapter
        self._fetcher = AdapterFetcher(self._inspect, replica.load_timeout)
        self._channel.watch(self._fetcher.fileno())
        self._channel.watch(replica.fileno())
        self._channel.watch(self._handovers.fileno())
        self._adapters: dict[str, AdapterSpec] = {}
        self._refused: list[SequenceProgress] = []
        self._stopped = False
        self.is_fenced = False
        self._details = DetailSchedule()
        self._allegiance = allegiance
        self._engine.on_start = self._tell_started

    def run(self) -> None:
        """Raises whatever makes the engine unable to go on."""
        # Model and libraries live as long as this process. Left to the collector, they would stop all threads for a
        # quarter of a second whenever enough requests and adapters have come and gone.
        gc.collect()
        gc.freeze()
        while True:
            if self._is_idle and (self._engine.has_work or not self._replica.warm_up_some()):
                self._rest()
            if self._allegiance is not None:
                self._allegiance.begin_round()
            commands = self._channel.receive()
            for command in commands:
                self._handle(command)
            if self._allegiance is not None and self._allegiance.hear(len(commands)):
                self._drop_requests()
            found = self._fetcher.take_found()
            for load in found:
                self._finish_load(*load)
            if self._stopped:
                return
            # Before the step: who has arrived is in it. What the exported ones drew was sent with the step before.
            for report in self._handovers.poll():
                self._channel.send(report)
            self._step(report=bool(commands or found))

    def _rest(self) -> None:
        timeout_ms = self._details.timeout_ms(self._clock())
        if self._allegiance is not None:
            self._allegiance.rest()
            timeout_ms = self._allegiance.limit(timeout_ms)
        self._channel.wait(timeout_ms)

    def _tell_started(self, request_ids: list[str]) -> None:
        self._channel.send(Started(request_ids=request_ids))

    @property
    def _is_idle(self) -> bool:
        return not self._handovers.is_due and (not self._engine.has_work or self._engine.waits_for_load)

    def _step(self, *, report: bool) -> None:
        """One engine step; its stats are reported with its progress, after commands, and when work ran out."""
        progress, self._refused = self._refused, []
        stepped = self._engine.has_work
        if stepped:
            progress += self._engine.step(self._clock())
            report |= not self._engine.has_work
        self._details.note(stepped=stepped, is_idle=self._is_idle, version=self._engine.residency_version)
        now = self._clock()
        if not self._details.is_due(now):
            if progress or report:
                self._channel.send(Progress(sequences=progress, stats=self._engine.stats()))
            return
        self._details.sent(now)
        self._channel.send(Progress(sequences=progress, stats=self._engine.stats(), detail=self._engine.detail()))

    def _handle(self, command: AnyCommand) -> None:
        match command:
            case AddRequest():
                self._add(command)
            case AbortRequest(request_ids=request_ids):
                self._engine.abort(request_ids)
                self._handovers.abort(request_ids)
            case ExportRequests(handover=handover, request_ids=request_ids):
                self._handovers.export(handover, request_ids)
            case EndExport(handover=handover, moved=moved):
                self._handovers.end_export(handover, moved=moved)
            case ImportRequests():
                self._import(command)
            case LoadAdapter():
                self._fetcher.start(command)
            case PinAdapter(name=name, content_hash=content_hash):
                self._engine.pin_adapter(name, content_hash)
                self._note_pin(name, pinned=content_hash is not None)
            case UnloadAdapter():
                self._adapters.pop(command.content_hash, None)
                self._engine.forget_adapter(command.content_hash)
                self._channel.send(AdapterResult(call_id=command.call_id))
            case Shutdown():
                self._stopped = True
            case Fence():
                # One that was let go before it hears this, because a sign of life crossed the farewell, ended well.
                self.is_fenced |= not self._stopped
                self._stopped = True
            case NameAdapters() | Identify() | Adopt():
                self._serve_another(command)
            case Ping() | Welcome():
                """That it came is all there is to it; the other is for who asked to join."""

    def _serve_another(self, command: NameAdapters | Identify | Adopt) -> None:
        """What concerns an orchestrator after this one, or is said by it."""
        if self._allegiance is None:
            return
        match command:
            case NameAdapters():
                self._allegiance.remember(command)
                self._channel.send(NamesKept(version=command.version))
            case Identify():
                self._drop_requests()
                self._allegiance.identify()
            case Adopt():
                self._drop_requests()
                self._details = DetailSchedule()
                self._allegiance.follow(command, self._replica, self._adapters.values())

    def _drop_requests(self) -> None:
        """End all requests: nobody reads what they bring."""
        self._handovers.clear()
        self._engine.abort(list(self._engine.requests))
        self._refused.clear()

    def _note_pin(self, name: str, *, pinned: bool) -> None:
        if self._allegiance is not None:
            self._allegiance.note_pin(name, pinned=pinned)

    def _add(self, command: AddRequest) -> None:
        try:
            self._engine.add_request(make_request(command, self._adapters, self._clock()))
        except (PeftDistError, ValueError) as error:
            self._refused.append(
                SequenceProgress(
                    request_id=command.request_id,
                    token_ids=[],
                    first_index=len(command.output_token_ids),
                    finish_reason="error",
                    error=str(error),
                )
            )

    def _import(self, command: ImportRequests) -> None:
        now = self._clock()
        try:
            requests = [make_request(request, self._adapters, now) for request in command.requests]
        except ValueError as error:
            self._channel.send(Imported(handover=command.handover, error=str(error)))
        else:
            self._handovers.import_requests(command.handover, requests, command.states)

    def _inspect(self, command: LoadAdapter) -> AdapterSpec:
        """Runs on a thread of the fetcher, beside the engine's steps."""
        path = self._find(command)
        return self._replica.inspect_adapter(command.name, path, allow_pickle=command.allow_pickle)

    def _finish_load(self, command: LoadAdapter, found: AdapterSpec | Exception) -> None:
        try:
            if isinstance(found, Exception):
                raise found
            spec = found
            self._replica.register_adapter(spec, allow_pickle=command.allow_pickle, pinned=command.pinned)
        except Exception as error:  # No adapter, however broken, may end the serving of the others.
            if not isinstance(error, PeftDistError):
                logger.exception("loading adapter %r failed", command.name)
            self._channel.send(AdapterResult(call_id=command.call_id, error=describe(error)))
        else:
            self._adapters[spec.content_hash] = spec
            self._note_pin(spec.name, pinned=command.pinned)
            self._channel.send(AdapterResult(call_id=command.call_id, spec=spec))


def describe(error: BaseException) -> str:
    """An error in one message: our own speak for themselves, others need their type."""
    return str(error) if isinstance(error, PeftDistError) else f"{type(error).__name__}: {error}"
