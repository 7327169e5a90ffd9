"""What drives an engine: commands in, reports out. Without a socket, a thread or a clock of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
        num_taken: Requests that were taken in, refused or not.
        adapters: Those that requests can name, by content hash; kept by whoever registers them with the engine.
    """

    def __init__(
        self,
        engine: Engine,
        handovers: Handovers,
        send: Callable[[AnyReport], None],
        clock: Callable[[], float],
        may_detail: Callable[[list[SequenceProgress]], bool] | None = None,
    ) -> None:
        """
        Args:
            clock: Seconds from any origin, never running backwards.
            may_detail: Whether details that are due are told with this progress, or with a later one; None: always.
        """
        self._may_detail = may_detail
        self._owes_detail = False
        self._engine = engine
        self._handovers = handovers
        self._send = send
        self._clock = clock
        self.adapters: dict[str, AdapterSpec] = {}
        self._refused: list[SequenceProgress] = []
        self._details = DetailSchedule()
        self.num_taken = 0
        engine.on_start = self._tell_started

    @property
    def is_idle(self) -> bool:
        """Whether a step makes no sense before something happens."""
        return (not self._engine.has_work or self._engine.waits_for_load) and not self._handovers.is_due

    def timeout_ms(self) -> int | None:
        """For how long an idle driver may be left alone, because of what is yet to be told; None: for ever."""
        return self._details.timeout_ms(self._clock())

    @property
    def plain_until(self) -> float:
        """Until when a step that begins is told of by its progress and stats alone; -inf: more is due before it.

        Details that need not be told as soon as they are due do not count.
        """
        if self._refused or not self._handovers.is_quiet:
            return -math.inf
        return self._details.due_at if self._may_detail is None else math.inf

    def stepped(self, starts: Sequence[float]) -> None:
        """The engine was stepped at these times, beside ``step``, and has more to do."""
        self._details.note(stepped=True, is_idle=False, version=self._engine.residency_version)
        self._owes_detail |= self._details.pass_by(starts)

    def drop_requests(self) -> None:
        """End all requests: nobody reads what they bring."""
        self._handovers.clear()
        self._engine.abort(list(self._engine.requests))
        self._refused.clear()

    def tell_anew(self) -> None:
        """Whoever listens from now on knows nothing yet."""
        self._details = DetailSchedule()
        self.num_taken = 0

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
        self._tell(progress, stepped=stepped, report=report)

    def tell(self, progress: list[SequenceProgress], starts: Sequence[float]) -> None:
        """Send what the last of some steps drew that were taken beside ``step`` at these times, and its stats."""
        if len(starts) > 1:
            self.stepped(starts[:-1])
        self._tell(progress, stepped=True, report=True)

    def _tell(self, progress: list[SequenceProgress], *, stepped: bool, report: bool) -> None:
        report |= stepped and not self._engine.has_work
        self._details.note(stepped=stepped, is_idle=self.is_idle, version=self._engine.residency_version)
        now = self._clock()
        if self._details.is_due(now):
            self._details.sent(now)
            self._owes_detail = True
        if not self._owes_detail or (self._may_detail is not None and not self._may_detail(progress)):
            if progress or report:
                self._send(Progress(sequences=progress, stats=self._engine.stats(), num_taken=self.num_taken))
            return
        self._owes_detail = False
        stats, detail = self._engine.stats(), self._engine.detail()
        self._send(Progress(sequences=progress, stats=stats, detail=detail, num_taken=self.num_taken))

    def _tell_started(self, request_ids: list[str]) -> None:
        self._send(Started(request_ids=request_ids))

    def _add(self, command: AddRequest) -> None:
        self.num_taken += 1
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
        self.num_taken += len(command.requests)
        now = self._clock()
        try:
            requests = [make_request(request, self.adapters, now) for request in command.requests]
        except ValueError as error:
            self._send(Imported(handover=command.handover, error=str(error)))
        else:
            self._handovers.import_requests(command.handover, requests, command.states)
