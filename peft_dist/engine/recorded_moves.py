"""Moves of requests with their KV, with all that enters them noted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peft_dist.core.handover import SequenceState
from peft_dist.core.messages import Exported, Imported
from peft_dist.core.request import Request
from peft_dist.engine.engine import Engine
from peft_dist.engine.executor import TransferOutcome
from peft_dist.engine.handovers import Handovers
from peft_dist.engine.recording import (
    AbortMoves,
    Add,
    ClearMoves,
    Copied,
    EndExport,
    Export,
    Import,
    Moves,
    Poll,
    RecordedEngine,
    Told,
)


class RecordedHandovers(Handovers):
    """Handovers of an engine that is recorded: their inputs are noted before they are obeyed."""

    def __init__(self, engine: RecordedEngine, ahead_blocks: int = 16) -> None:
        super().__init__(engine, ahead_blocks)
        self._recorded = engine
        engine.recorder.note(Moves(ahead_blocks))

    def export(self, handover: int, request_ids: Iterable[str]) -> None:
        ids, export = list(request_ids), super().export
        self._recorded.noted(Export(handover, ids), lambda: export(handover, ids))

    def end_export(self, handover: int, *, moved: bool) -> None:
        end_export = super().end_export
        self._recorded.noted(EndExport(handover, moved), lambda: end_export(handover, moved=moved))

    def import_requests(self, handover: int, requests: Sequence[Request], states: Sequence[SequenceState]) -> None:
        import_requests = super().import_requests
        entry = Import(handover, [Add.of(request) for request in requests], list(states))
        self._recorded.noted(entry, lambda: import_requests(handover, requests, states))

    def abort(self, request_ids: Iterable[str]) -> None:
        ids, abort = list(request_ids), super().abort
        self._recorded.noted(AbortMoves(ids), lambda: abort(ids))

    def clear(self) -> None:
        self._recorded.noted(ClearMoves(), super().clear)

    def poll(self) -> list[Exported | Imported]:
        if self.is_quiet:
            # Copies may end that nobody waits for any more.
            return super().poll()
        reports: list[Exported | Imported] = self._recorded.noted(Poll(), super().poll)
        self._recorded.recorder.note(Told.of(reports))
        return reports

    def _note(self, outcome: TransferOutcome) -> None:
        if not self.is_quiet:
            self._recorded.recorder.note(Copied(outcome))
        super()._note(outcome)


def make_handovers(engine: Engine, ahead_blocks: int = 16) -> Handovers:
    """Of an engine, recorded if it is. ``ahead_blocks``: As of ``Handovers``."""
    kind = RecordedHandovers if isinstance(engine, RecordedEngine) else Handovers
    return kind(engine, ahead_blocks)  # type: ignore[arg-type]
