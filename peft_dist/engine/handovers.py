"""Requests on their way to another engine with their KV, or from one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from peft_dist.core.handover import KVHandle, SequenceState
from peft_dist.core.messages import Exported, Imported
from peft_dist.core.request import Request, RequestStatus
from peft_dist.engine.engine import Engine
from peft_dist.engine.executor import TransferOutcome


@dataclass(slots=True)
class _Transfer:
    """
    Attributes:
        barrier: Batches before this one may still write to the blocks.
        states: By request, of imports.
        copies: Keys of the copies of requests that have blocks, from the moment at which they began.
        num_left: Of these, the ones under way.
        told: It was reported.
    """

    handover: int
    requests: list[Request]
    barrier: int
    states: dict[str, SequenceState] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    handles: dict[str, KVHandle] = field(default_factory=dict)
    num_left: int = 0
    has_begun: bool = False
    told: bool = False
    aborted: bool = False
    error: str | None = None


class Handovers:
    """Exports and imports of one engine. No call waits; ``poll`` between two steps carries on what can go on.

    An exported request is held where it is until ``end_export``. One that is imported gets blocks, and enters the
    engine once they are filled, as one that was swapped in.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._scheduler = engine.scheduler
        self._executor = engine.executor
        self._exports: dict[int, _Transfer] = {}
        self._imports: dict[int, _Transfer] = {}
        self._copies: dict[int, tuple[_Transfer, str]] = {}
        self._refused: list[Imported] = []
        self._next_key = 0

    def fileno(self) -> int:
        """A file descriptor that is readable when ``poll`` has something to do."""
        return self._executor.transfers_fileno()

    @property
    def is_due(self) -> bool:
        """Whether ``poll`` has something to do that ``fileno`` does not tell of."""
        return bool(self._refused) or any(
            self._can_begin(t) for t in (*self._exports.values(), *self._imports.values())
        )

    def export(self, handover: int, request_ids: Iterable[str]) -> None:
        """Hold requests, and copy their KV when no step in flight has them any more; ``poll`` tells the end."""
        queue = self._scheduler.queue
        requests = [queue[request_id] for request_id in request_ids if request_id in queue]
        for request in requests:
            self._scheduler.hold(request)
        self._exports[handover] = _Transfer(handover, requests, self._scheduler.next_step)

    def end_export(self, handover: int, *, moved: bool) -> None:
        """End exported requests, which run elsewhere now, or let them go on here. Ignored when there are none."""
        export = self._exports.pop(handover, None)
        if export is None:
            return
        for key in export.copies.values():
            self._executor.end_export(key)
            self._copies.pop(key, None)
        left = [request for request in export.requests if not request.is_finished]
        if moved:
            self._engine.abort(request.request_id for request in left)
            return
        for request in left:
            self._scheduler.go_on(request)

    def import_requests(self, handover: int, requests: Sequence[Request], states: Sequence[SequenceState]) -> None:
        """Take requests in with their KV, all or none; ``poll`` tells the end."""
        by_id = {request.request_id: state for request, state in zip(requests, states, strict=True)}
        arrival = _Transfer(handover, list(requests), self._scheduler.next_step, by_id)
        if (refusal := self._allocate(arrival)) is not None:
            self._refused.append(refusal)
        else:
            self._imports[handover] = arrival

    def abort(self, request_ids: Iterable[str]) -> None:
        """Give up imports that have one of these requests; their blocks are free once nobody fills them any more."""
        ids = set(request_ids)
        for arrival in self._imports.values():
            arrival.aborted |= any(request.request_id in ids for request in arrival.requests)

    def poll(self) -> list[Exported | Imported]:
        """Begin copies whose blocks no step in flight touches, and tell of what has ended."""
        for outcome in self._executor.take_transfers():
            self._note(outcome)
        for transfer in self._all():
            if self._can_begin(transfer):
                self._begin(transfer)
        reports: list[Exported | Imported] = [*self._refused]
        self._refused = []
        for export in self._exports.values():
            if export.has_begun and not export.num_left and not export.told:
                export.told = True
                reports.append(self._exported(export))
        for arrival in [a for a in self._imports.values() if a.has_begun and not a.num_left]:
            del self._imports[arrival.handover]
            reports.append(self._enter(arrival))
        return reports

    def check(self) -> None:
        """Raise AssertionError unless whoever is held is being exported."""
        exported = {r.request_id for export in self._exports.values() for r in export.requests if not r.is_finished}
        assert exported == self._scheduler.held.keys(), "held for nobody"

    def _all(self) -> list[_Transfer]:
        return [*self._exports.values(), *self._imports.values()]

    def _can_begin(self, transfer: _Transfer) -> bool:
        return not transfer.has_begun and self._engine.has_settled(transfer.barrier)

    def _begin(self, transfer: _Transfer) -> None:
        transfer.has_begun = True
        for request in transfer.requests:
            request_id = request.request_id
            state = transfer.states.get(request_id)
            num_tokens = state.num_computed_tokens if state is not None else request.num_computed_tokens
            blocks, on_host = self._scheduler.blocks.blocks_of(request_id, num_tokens)
            # What ended in its last step, or waits after a preemption, has none.
            if not blocks or request.is_finished:
                continue
            key, self._next_key = self._next_key, self._next_key + 1
            self._copies[key] = (transfer, request_id)
            transfer.copies[request_id] = key
            transfer.num_left += 1
            if state is None:
                self._executor.start_export(key, blocks, on_host=on_host)
            else:
                assert state.kv is not None, "it has blocks"
                self._executor.start_import(key, state.kv, blocks)

    def _note(self, outcome: TransferOutcome) -> None:
        known = self._copies.pop(outcome.key, None)
        if known is None:
            return  # Its export was ended meanwhile.
        transfer, request_id = known
        transfer.num_left -= 1
        transfer.error = transfer.error or outcome.error
        if outcome.kv is not None:
            transfer.handles[request_id] = outcome.kv
        elif outcome.error is None and (kv := transfer.states[request_id].kv) is not None:
            self._engine.cost.observe_transfer(kv.num_bytes, kv.seconds + outcome.seconds)

    def _exported(self, export: _Transfer) -> Exported:
        if export.error is not None:
            return Exported(handover=export.handover, error=export.error)
        left = [request for request in export.requests if not request.is_finished]
        return Exported(handover=export.handover, sequences=[self._state(export, request) for request in left])

    def _state(self, export: _Transfer, request: Request) -> SequenceState:
        kv = export.handles.get(request.request_id)
        return SequenceState(
            request_id=request.request_id,
            num_output_tokens=len(request.output_token_ids),
            num_computed_tokens=request.num_computed_tokens if kv is not None else 0,
            num_cached_tokens=request.num_cached_tokens,
            # Those of a prompt that is through were told with its first token.
            prompt_logprobs=[] if request.output_token_ids else request.prompt_logprobs,
            kv=kv,
        )

    def _allocate(self, arrival: _Transfer) -> Imported | None:
        """Blocks for all that is to come; the refusal when there are none."""
        blocks = self._scheduler.blocks
        taken: list[str] = []
        for request in arrival.requests:
            request_id, state = request.request_id, arrival.states[request.request_id]
            is_in_use = request_id in self._engine.requests or bool(blocks.blocks_of(request_id, 1)[0])
            if not is_in_use and (state.kv is None or blocks.allocate(request_id, [], state.num_computed_tokens)):
                taken.append(request_id)
                continue
            for other in taken:
                blocks.free(other)
            if is_in_use:
                return Imported(handover=arrival.handover, error=f"request id {request_id!r} is already in use")
            needed = blocks.blocks_for(state.num_computed_tokens)
            problem = f"{needed} KV blocks are needed and {blocks.num_free} are free: try again later"
            return Imported(handover=arrival.handover, error=problem, is_full=True)
        return None

    def _enter(self, arrival: _Transfer) -> Imported:
        error = "it was aborted" if arrival.aborted else arrival.error
        entered = []
        for request in arrival.requests:
            try:
                if error is None:
                    self._add(request, arrival.states[request.request_id])
                    entered.append(request.request_id)
            except ValueError as problem:
                error = str(problem)
        if error is not None:
            self._engine.abort(entered)
            for request in arrival.requests:
                self._scheduler.blocks.free(request.request_id)
        return Imported(handover=arrival.handover, error=error)

    def _add(self, request: Request, state: SequenceState) -> None:
        request.num_cached_tokens = state.num_cached_tokens
        request.prompt_logprobs = list(state.prompt_logprobs)
        if state.kv is not None:
            request.num_computed_tokens = state.num_computed_tokens
            request.status = RequestStatus.RUNNING
        else:
            # Scored anew, from the first position on.
            request.prompt_logprobs = []
        self._engine.add_request(request)
