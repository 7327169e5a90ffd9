"""Requests on their way to another engine with their KV, or from one."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from peft_dist.core.handover import KVHandle, SequenceState
from peft_dist.core.messages import Exported, Imported
from peft_dist.core.request import Request, RequestStatus
from peft_dist.engine.engine import Engine
from peft_dist.engine.executor import TransferOutcome


class _Stage(enum.Enum):
    """AHEAD stages are those of exports whose requests still run. DUE ones wait for steps in flight."""

    AHEAD_DUE = enum.auto()
    AHEAD = enum.auto()
    DUE = enum.auto()
    COPYING = enum.auto()
    TOLD = enum.auto()


@dataclass(slots=True)
class _Transfer:
    """
    Attributes:
        barrier: Batches before this one may still write to the blocks.
        states: By request, of imports; None for an export.
        ahead: Full blocks that are copied while the request runs, and how often it had been preempted by then.
        copies: Keys of the copies of each request, in the order of its blocks.
        num_left: Of these, the ones under way.
        handles, seconds: Of the copies that have ended.
    """

    handover: int
    requests: list[Request]
    barrier: int
    stage: _Stage = _Stage.DUE
    states: dict[str, SequenceState] | None = None
    ahead: dict[str, tuple[int, int]] = field(default_factory=dict)
    copies: dict[str, list[int]] = field(default_factory=dict)
    handles: dict[int, KVHandle] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    num_left: int = 0
    aborted: bool = False
    error: str | None = None


class Handovers:
    """Exports and imports of one engine. No call waits; ``poll`` between two steps carries on what can go on.

    Of a request that is exported, the full blocks are copied first, which nobody writes to any more; then it is held,
    the rest is copied, and it stays held until ``end_export``. One that is imported gets blocks, and enters the engine
    once they are filled, as one that was swapped in.
    """

    def __init__(self, engine: Engine, ahead_blocks: int = 16) -> None:
        """``ahead_blocks``: So many full blocks are worth a copy of their own while the request still runs."""
        self._engine = engine
        self._ahead_blocks = ahead_blocks
        self._scheduler = engine.scheduler
        self._executor = engine.executor
        self._exports: dict[int, _Transfer] = {}
        self._imports: dict[int, _Transfer] = {}
        self._copies: dict[int, _Transfer] = {}
        self._refused: list[Imported] = []
        self._next_key = 0

    def fileno(self) -> int:
        """A file descriptor that is readable when ``poll`` has something to do."""
        return self._executor.transfers_fileno()

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is under way."""
        return not (self._exports or self._imports or self._copies or self._refused)

    @property
    def is_due(self) -> bool:
        """Whether ``poll`` has something to do that ``fileno`` does not tell of."""
        return bool(self._refused) or (not self.is_quiet and any(map(self._can_begin, self._all())))

    def export(self, handover: int, request_ids: Iterable[str]) -> None:
        """Copy the KV of queued requests, and hold them for the end of it, which ``poll`` tells."""
        queue = self._scheduler.queue
        requests = [queue[request_id] for request_id in request_ids if request_id in queue]
        export = self._exports[handover] = _Transfer(handover, requests, self._scheduler.next_step)
        for request in requests:
            full = request.num_computed_tokens // self._scheduler.blocks.block_size
            if request.status is RequestStatus.RUNNING and full >= self._ahead_blocks:
                export.ahead[request.request_id] = full, request.num_preemptions
        if export.ahead:
            export.stage = _Stage.AHEAD_DUE
        else:
            self._hold(export)

    def end_export(self, handover: int, *, moved: bool) -> None:
        """End exported requests, which run elsewhere now, or let them go on here. Ignored when there are none."""
        export = self._exports.pop(handover, None)
        if export is None:
            return
        for request_id in list(export.copies):
            self._drop_copies(export, request_id)
        if moved:
            self._engine.abort(request.request_id for request in export.requests if not request.is_finished)
            return
        for request in export.requests:
            if request.request_id in self._scheduler.held:
                self._scheduler.go_on(request)

    def import_requests(self, handover: int, requests: Sequence[Request], states: Sequence[SequenceState]) -> None:
        """Take requests in with their KV, all or none; ``poll`` tells the end."""
        by_id = {request.request_id: state for request, state in zip(requests, states, strict=True)}
        arrival = _Transfer(handover, list(requests), self._scheduler.next_step, states=by_id)
        if (refusal := self._allocate(arrival, by_id)) is not None:
            self._refused.append(refusal)
        else:
            self._imports[handover] = arrival

    def abort(self, request_ids: Iterable[str]) -> None:
        """Give up imports that have one of these requests; their blocks are free once nobody fills them any more."""
        ids = set(request_ids)
        for arrival in self._imports.values():
            arrival.aborted |= any(request.request_id in ids for request in arrival.requests)

    def clear(self) -> None:
        """Give up whatever is under way, and abort its requests."""
        for handover in list(self._exports):
            self.end_export(handover, moved=True)
        for arrival in self._imports.values():
            arrival.aborted = True

    def poll(self) -> list[Exported | Imported]:
        """Begin copies whose blocks no step in flight touches, and tell of what has ended."""
        for outcome in self._executor.take_transfers():
            self._note(outcome)
        if self.is_quiet:
            return []
        for transfer in self._all():
            while self._can_begin(transfer):
                self._begin(transfer)
        reports: list[Exported | Imported] = [*self._refused]
        self._refused = []
        for transfer in self._all():
            if transfer.stage is _Stage.COPYING and not transfer.num_left:
                transfer.stage = _Stage.TOLD
                reports.append(
                    self._exported(transfer) if transfer.states is None else self._enter(transfer, transfer.states)
                )
        return reports

    def check(self) -> None:
        """Raise AssertionError unless whoever is held is being exported."""
        held = [e for e in self._exports.values() if e.stage not in (_Stage.AHEAD_DUE, _Stage.AHEAD)]
        exported = {r.request_id for export in held for r in export.requests if not r.is_finished}
        assert exported == self._scheduler.held.keys(), "held for nobody"

    def _all(self) -> list[_Transfer]:
        return [*self._exports.values(), *self._imports.values()]

    def _can_begin(self, transfer: _Transfer) -> bool:
        if transfer.stage is _Stage.AHEAD:
            return not transfer.num_left
        return transfer.stage in (_Stage.AHEAD_DUE, _Stage.DUE) and self._engine.has_settled(transfer.barrier)

    def _hold(self, export: _Transfer) -> None:
        for request in export.requests:
            if not request.is_finished:
                self._scheduler.hold(request)
        export.barrier, export.stage = self._scheduler.next_step, _Stage.DUE

    def _begin(self, transfer: _Transfer) -> None:
        """The next stage: copies of what the blocks hold now, or the end of what was copied ahead."""
        if transfer.stage is _Stage.AHEAD:
            self._hold(transfer)
            return
        if transfer.stage is _Stage.AHEAD_DUE:
            transfer.stage = _Stage.AHEAD
            for request in transfer.requests:
                if self._has_ahead(transfer, request):
                    self._export(transfer, request, 0, transfer.ahead[request.request_id][0], ahead=True)
            return
        transfer.stage = _Stage.COPYING
        for request in transfer.requests:
            if transfer.states is not None:
                self._import(transfer, request, transfer.states[request.request_id])
            elif not request.is_finished:
                assert not request.num_in_flight, "a step in flight has it"
                first = transfer.ahead[request.request_id][0] if self._has_ahead(transfer, request) else 0
                if not first:
                    self._drop_copies(transfer, request.request_id)
                self._export(transfer, request, first, None)

    def _has_ahead(self, export: _Transfer, request: Request) -> bool:
        """Whether the request still has the blocks that are, or were, copied ahead."""
        _, num_preemptions = export.ahead.get(request.request_id, (0, -1))
        return request.num_preemptions == num_preemptions and not request.is_finished

    def _export(
        self, export: _Transfer, request: Request, first: int, last: int | None, *, ahead: bool = False
    ) -> None:
        blocks, on_host = self._scheduler.blocks.blocks_of(request.request_id, request.num_computed_tokens)
        # What waits after a preemption has none.
        if part := blocks[first:last]:
            self._executor.start_export(self._new_copy(export, request), part, on_host=on_host, ahead=ahead)

    def _import(self, arrival: _Transfer, request: Request, state: SequenceState) -> None:
        first = 0
        blocks, _ = self._scheduler.blocks.blocks_of(request.request_id, state.num_computed_tokens)
        for kv in state.kv:
            self._executor.start_import(self._new_copy(arrival, request), kv, blocks[first : first + kv.num_blocks])
            first += kv.num_blocks

    def _new_copy(self, transfer: _Transfer, request: Request) -> int:
        key, self._next_key = self._next_key, self._next_key + 1
        self._copies[key] = transfer
        transfer.copies.setdefault(request.request_id, []).append(key)
        transfer.num_left += 1
        return key

    def _drop_copies(self, export: _Transfer, request_id: str) -> None:
        for key in export.copies.pop(request_id, ()):
            self._executor.end_export(key)
            self._copies.pop(key, None)

    def _note(self, outcome: TransferOutcome) -> None:
        transfer = self._copies.pop(outcome.key, None)
        if transfer is None:
            return  # Its export was ended meanwhile.
        transfer.num_left -= 1
        transfer.error = transfer.error or outcome.error
        transfer.seconds[outcome.key] = outcome.seconds
        if outcome.kv is not None:
            transfer.handles[outcome.key] = outcome.kv

    def _exported(self, export: _Transfer) -> Exported:
        if export.error is not None:
            return Exported(handover=export.handover, error=export.error)
        left = [request for request in export.requests if not request.is_finished]
        return Exported(handover=export.handover, sequences=[self._state(export, request) for request in left])

    def _state(self, export: _Transfer, request: Request) -> SequenceState:
        kv = [export.handles[key] for key in export.copies.get(request.request_id, ())]
        return SequenceState(
            request_id=request.request_id,
            num_output_tokens=len(request.output_token_ids),
            num_computed_tokens=request.num_computed_tokens if kv else 0,
            num_cached_tokens=request.num_cached_tokens,
            # Those of a prompt that is through were told with its first token.
            prompt_logprobs=[] if request.output_token_ids else request.prompt_logprobs,
            kv=kv,
        )

    def _allocate(self, arrival: _Transfer, states: dict[str, SequenceState]) -> Imported | None:
        """Blocks for all that is to come; the refusal when there are none."""
        blocks = self._scheduler.blocks
        taken: list[str] = []
        for request in arrival.requests:
            request_id, state = request.request_id, states[request.request_id]
            needed = blocks.blocks_for(state.num_computed_tokens)
            problem, is_full = None, False
            if request_id in self._engine.requests or blocks.blocks_of(request_id, 1)[0]:
                problem = f"request id {request_id!r} is already in use"
            elif sum(kv.num_blocks for kv in state.kv) != needed:
                problem = f"{state.num_computed_tokens} tokens have {needed} blocks here, not those that were exported"
            elif not state.kv:
                continue
            elif not blocks.allocate(request_id, [], state.num_computed_tokens):
                problem, is_full = f"{needed} KV blocks are needed, {blocks.num_free} are free: try again later", True
            if problem is None:
                taken.append(request_id)
                continue
            for other in taken:
                blocks.free(other)
            return Imported(handover=arrival.handover, error=problem, is_full=is_full)
        return None

    def _enter(self, arrival: _Transfer, states: dict[str, SequenceState]) -> Imported:
        del self._imports[arrival.handover]
        error = "it was aborted" if arrival.aborted else arrival.error
        entered = []
        for request in arrival.requests:
            try:
                if error is None:
                    self._add(request, states[request.request_id])
                    entered.append(request.request_id)
            except ValueError as problem:
                error = str(problem)
        if error is not None:
            self._engine.abort(entered)
            for request in arrival.requests:
                self._scheduler.blocks.free(request.request_id)
        else:
            self._observe(arrival, states)
        return Imported(handover=arrival.handover, error=error)

    def _add(self, request: Request, state: SequenceState) -> None:
        request.num_cached_tokens = state.num_cached_tokens
        if state.kv:
            # Without its KV a prompt is scored anew, from the first position on.
            request.prompt_logprobs = list(state.prompt_logprobs)
            request.num_computed_tokens = state.num_computed_tokens
            request.status = RequestStatus.RUNNING
        self._engine.add_request(request)

    def _observe(self, arrival: _Transfer, states: dict[str, SequenceState]) -> None:
        """What a request waited for: the copy of its last part, and the way in."""
        for request_id, keys in arrival.copies.items():
            parts = states[request_id].kv
            seconds = parts[-1].seconds + sum(arrival.seconds[key] for key in keys)
            self._engine.cost.observe_transfer(sum(kv.total_bytes for kv in parts), seconds)
