"""What drives an engine: commands in, reports out. Without a socket, a thread or a clock of its own."""

from __future__ import annotations

from collections.abc import Callable

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import PeftDistError
from peft_dist.core.messages import (
    AbortRequest,
    AddRequest,
    AnyCommand,
    AnyReport,
    EndExport,
    ExportRequests,
    Imported,
    ImportRequests,
    PinAdapter,
    PrefetchAdapter,
    Progress,
    SequenceProgress,
    Started,
)
from peft_dist.engine.commands import make_request
from peft_dist.engine.detail_schedule import DetailSchedule
from peft_dist.engine.engine import Engine
from peft_dist.engine.handovers import Handovers


class EngineDriver:
    """Rounds of an engine: first commands (``handle``), then a step (``step``); each tells what came of it.

    Attributes:
        adapters: Those that requests can name, by content hash; kept by whoever registers them with the engine.
    """

    def __init__(
        self, engine: Engine, handovers: Handovers, send: Callable[[AnyReport], None], clock: Callable[[], float]
    ) -> None:
        """``clock``: Seconds from any origin, never running backwards."""
        self._engine = engine
        self._handovers = handovers
        self._send = send
        self._clock = clock
        self.adapters: dict[str, AdapterSpec] = {}
        self._refused: list[SequenceProgress] = []
        self._details = DetailSchedule()
        self._num_taken = 0
        engine.on_start = self._tell_started

    @property
    def is_idle(self) -> bool:
        """Whether a step makes no sense before something happens."""
        return not self._handovers.is_due and (not self._engine.has_work or self._engine.waits_for_load)

    def timeout_ms(self) -> int | None:
        """For how long an idle driver may be left alone, because of what is yet to be told; None: for ever."""
        return self._details.timeout_ms(self._clock())

    def drop_requests(self) -> None:
        """End all requests: nobody reads what they bring."""
        self._handovers.clear()
        self._engine.abort(list(self._engine.requests))
        self._refused.clear()

    def tell_anew(self) -> None:
        """Whoever listens from now on knows nothing yet."""
        self._details = DetailSchedule()
        self._num_taken = 0

    def handle(self, command: AnyCommand) -> None:
        """Do what concerns the engine alone; other commands are their receiver's, and ignored here."""
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
            case PinAdapter(name=name, content_hash=content_hash):
                self._engine.pin_adapter(name, content_hash)
            case PrefetchAdapter(content_hash=content_hash):
                self._engine.prefetch_adapter(content_hash)

    def step(self, *, report: bool) -> None:
        """One engine step; its stats are told with its progress, with ``report`` in any case, and when work ran out."""
        # Before the step: who has arrived is in it. What the exported ones drew was sent with the step before.
        for outcome in self._handovers.poll():
            self._send(outcome)
        progress, self._refused = self._refused, []
        stepped = self._engine.has_work
        if stepped:
            progress += self._engine.step(self._clock())
            report |= not self._engine.has_work
        self._details.note(stepped=stepped, is_idle=self.is_idle, version=self._engine.residency_version)
        now = self._clock()
        if not self._details.is_due(now):
            if progress or report:
                self._send(Progress(sequences=progress, stats=self._engine.stats(), num_taken=self._num_taken))
            return
        self._details.sent(now)
        stats, detail = self._engine.stats(), self._engine.detail()
        self._send(Progress(sequences=progress, stats=stats, detail=detail, num_taken=self._num_taken))

    def _tell_started(self, request_ids: list[str]) -> None:
        self._send(Started(request_ids=request_ids))

    def _add(self, command: AddRequest) -> None:
        self._num_taken += 1
        try:
            self._engine.add_request(make_request(command, self.adapters, self._clock()))
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
        self._num_taken += len(command.requests)
        now = self._clock()
        try:
            requests = [make_request(request, self.adapters, now) for request in command.requests]
        except ValueError as error:
            self._send(Imported(handover=command.handover, error=str(error)))
        else:
            self._handovers.import_requests(command.handover, requests, command.states)
