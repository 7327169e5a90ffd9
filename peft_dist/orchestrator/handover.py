"""Running requests that go to another replica with their KV, one message after another."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from peft_dist.core.handover import SequenceState
from peft_dist.core.messages import (
    AbortRequest,
    AnyReport,
    EndExport,
    Exported,
    ExportRequests,
    Imported,
    ImportRequests,
)
from peft_dist.core.step_costs import StepCosts
from peft_dist.orchestrator.adapter_calls import to
from peft_dist.orchestrator.move_counts import CALL, MoveCounts
from peft_dist.orchestrator.options import OrchestratorOptions
from peft_dist.orchestrator.placer import Placer
from peft_dist.orchestrator.poison import MAX_DEATHS
from peft_dist.orchestrator.records import Outgoing, Replica, ReplicaState, RequestRecord
from peft_dist.orchestrator.replicas import ReplicaTable
from peft_dist.orchestrator.requests import RequestTable, add_commands
from peft_dist.orchestrator.turns import Turns, Wish, kv_bytes
from peft_dist.policy.moving import moves_kv

# A move is given up when it takes so many times as long as it should by what moves have cost, and handover_timeout at
# least; but not later than after so many of these, whatever one slow copy has made of the costs.
_PATIENCE = 4.0


@dataclass(slots=True)
class _Move:
    """A request under way. It is its source's until the target has said that it runs it.

    Attributes:
        asked_at: Seconds.
        cause: Why it moves, for the counts.
        num_moves: The record's when it was asked for; another one means that it left the source in another way.
        room: Bytes of KV that it was expected to bring at most.
        ids: What the target knows its sequences as, by index, once it has been asked to import them.
        computed: Tokens whose KV came along, by index; ``num_bytes`` is the size of it, by memory.
    """

    number: int
    record: RequestRecord
    source: Replica
    target: Replica
    asked_at: float
    deadline: float
    num_moves: int
    cause: str
    room: int
    ids: dict[int, str] = field(default_factory=dict)
    computed: dict[int, int] = field(default_factory=dict)
    num_bytes: Counter[str] = field(default_factory=Counter)


class Handover:
    """Moves requests between replicas: asked (the source holds it), exported, imported, released.

    At every moment one replica owns the request: the source until ``Imported``, from then on the target, under sequence
    ids that nobody knew before. Where the target lacks room, dies or takes too long, the request goes on at its source,
    which still holds it; where its KV cannot be had, or the source is lost or drains, elsewhere from the known tokens.
    From each source a few go at once; the next one is asked for when one of them has ended, however that was.
    """

    def __init__(
        self,
        requests: RequestTable,
        replicas: ReplicaTable,
        placer: Placer,
        options: OrchestratorOptions,
        counts: MoveCounts,
    ) -> None:
        self._requests = requests
        self._replicas = replicas
        self._placer = placer
        self._timeout = options.handover_timeout
        self._moves: dict[int, _Move] = {}
        # By request, the last one of that name: asked for each of many.
        self._moving: dict[str, _Move] = {}
        self._turns = Turns(options.max_handovers, options.max_handover_bytes)
        self._next_number = options.first_number
        self._counts = counts

    @property
    def num_with_kv(self) -> int:
        """Requests that have moved with their KV."""
        return self._counts.view().by_way().get("kv", 0)

    @property
    def num_recomputed(self) -> int:
        """Requests that have moved without it."""
        return self._counts.view().by_way().get("recompute", 0)

    @property
    def num_failed(self) -> int:
        """Requests that were to move with their KV, and did not though they had not ended."""
        ends = self._counts.view().ends
        return sum(number for (_, way, end), number in ends.items() if way == "kv" and end not in ("moved", "ended"))

    def latest_seconds(self, number: int) -> list[float]:
        """As ``MoveCounts.latest``: from when the source was asked to when the target said that it has the request."""
        return self._counts.latest(number)

    def move(self, request_id: str, replica_id: int, now: float, *, with_kv: bool | None = None) -> list[Outgoing]:
        """Have another replica go on with a running request, in the cheaper way; ``with_kv`` says which one.

        Nothing happens when the request has ended, is under way or nobody's, or when that replica cannot run it.
        """
        found = self._requests.running(request_id)
        target = self._replicas.get(replica_id)
        if not found or target is None or not self._placer.can_take(found[0][0], target):
            return []
        return self.move_record(found[0][0], target, now, with_kv=with_kv)

    def move_record(
        self, record: RequestRecord, target: Replica, now: float, *, with_kv: bool | None = None, cause: str = CALL
    ) -> list[Outgoing]:
        """As ``move``; the target must be able to run the request. It may wait for its turn, and runs meanwhile."""
        out = self.begin(record, target, now, with_kv=with_kv, cause=cause)
        if out is None:
            assert record.replica_id is not None, "it waits to leave one"
            self._turns.wait(Wish(record, self._replicas[record.replica_id], target, cause, record.num_moves))
        return out or []

    def begin(
        self, record: RequestRecord, target: Replica, now: float, *, with_kv: bool | None = None, cause: str = CALL
    ) -> list[Outgoing] | None:
        """As ``move_record``; None, and nothing happens, where it would have to wait."""
        if record.replica_id is None or record.replica_id == target.replica_id or self.is_under_way(record):
            return []
        source = self._replicas[record.replica_id]
        with_kv = self._is_cheaper(record, source, target) if with_kv is None else with_kv
        if not with_kv or record.num_import_deaths >= MAX_DEATHS or self._turns.is_too_large(record, source):
            self._counts.recompute(cause)
            return self._placer.move(record, target, now)
        return self._ask(record, source, target, now, cause) if self._turns.may_begin(record, source) else None

    def drop_waiting(self, cause: str) -> int:
        """Forget the moves for this cause whose turn has not come; how many."""
        return len(self._turns.drop(cause=cause))

    def is_under_way(self, record: RequestRecord) -> bool:
        """Whether a request is being handed over."""
        move = self._moving.get(record.request_id)
        return move is not None and move.record is record

    def under_way(self) -> list[tuple[RequestRecord, Replica]]:
        """Requests that are being handed over, and where to."""
        return [(move.record, move.target) for move in self._moves.values() if self._is_current(move)]

    def observe(self, replica: Replica, report: AnyReport, now: float) -> list[Outgoing]:
        """A replica's answer to what it was asked for; all else, and what nobody waits for any more, is passed over."""
        match report:
            case Exported(handover=number):
                move = self._moves.get(number)
                if move is not None and move.source is replica and not move.ids:
                    return self._exported(move, report, now) + self._go_on(now)
            case Imported(handover=number):
                move = self._moves.get(number)
                if move is not None and move.target is replica and move.ids:
                    return self._imported(move, report, now) + self._go_on(now)
        return []

    def lose(self, replica: Replica, now: float) -> tuple[list[Outgoing], list[RequestRecord]]:
        """A replica is dead: what was to come from it or go to it does not. Its requests are still its own.

        Returns also those that it was taking in, and others have.
        """
        out: list[Outgoing] = []
        brought: list[RequestRecord] = []
        for wish in self._turns.drop(source=replica):
            self._counts.fail(wish.cause, "lost" if wish.is_current else "ended")
        for move in list(self._moves.values()):
            if move.source is replica:
                self._end(move)
                self._counts.fail(move.cause, "lost" if self._is_current(move) else "ended")
                out += self._abort_import(move)
            elif move.target is replica:
                if move.ids and self._is_current(move):
                    brought.append(move.record)
                out += self._give_up(move, now)
        return out + self._go_on(now), brought

    def tick(self, now: float) -> list[Outgoing]:
        """Give up what has taken too long, and go on with what was left."""
        late = [move for move in self._moves.values() if move.deadline <= now]
        out = [out for move in late for out in self._give_up(move, now)]
        return out + self._go_on(now) if late or self._placer.goes_on_at <= now else out

    def next_deadline(self) -> float:
        """When ``tick`` has something to do; infinity for never."""
        return min(self._placer.goes_on_at, *(move.deadline for move in self._moves.values()), math.inf)

    def _ask(self, record: RequestRecord, source: Replica, target: Replica, now: float, cause: str) -> list[Outgoing]:
        number, self._next_number = self._next_number, self._next_number + 1
        deadline = now + self._patience(record, source, target)
        room = self._turns.begin(record, source)
        move = _Move(number, record, source, target, now, deadline, record.num_moves, cause, room)
        self._moves[number] = self._moving[record.request_id] = move
        ids = [sequence.sequence_id for sequence in record.unfinished.values()]
        return [to(source, ExportRequests(handover=number, request_ids=ids))]

    def _patience(self, record: RequestRecord, source: Replica, target: Replica) -> float:
        """For how long a move may take: large ones need more, and stand behind those that have begun before them."""
        leaving = [move.record for move in self._moves.values() if move.source is source]
        num_bytes = sum(kv_bytes(each, source) for each in (record, *leaving))
        usual = (target.costs or source.costs or StepCosts()).transfer_seconds(num_bytes)
        return min(max(self._timeout, _PATIENCE * usual), _PATIENCE * self._timeout)

    def _end(self, move: _Move) -> None:
        del self._moves[move.number]
        # A later request of the same name may be on its way before this one's source has said anything.
        if self._moving.get(move.record.request_id) is move:
            del self._moving[move.record.request_id]
        self._turns.end(move.source, move.room)

    def _go_on(self, now: float) -> list[Outgoing]:
        """Ask for those whose turn has come since some have ended."""
        out: list[Outgoing] = []
        while (wish := self._turns.take()) is not None:
            record, target = wish.record, wish.target
            if not wish.is_current:
                self._counts.fail(wish.cause, "ended")
            elif not self._placer.can_take(record, target):
                # Where its replica drains, it is chosen another one in its turn there.
                self._counts.fail(wish.cause, "stayed")
            else:
                out += self._ask(record, wish.source, target, now, wish.cause)
        return out + self._placer.go_on(now)

    def _is_cheaper(self, record: RequestRecord, source: Replica, target: Replica) -> bool:
        ours, theirs = source.model, target.model
        if ours is None or theirs is None or ours.kv_size != theirs.kv_size:
            return False
        if record.is_suspect or record.num_import_deaths:
            return False
        num_tokens = num_bytes = 0
        for sequence in record.unfinished.values():
            # How far a prompt is that drew nothing yet is not known: half of it, on average.
            prompt = len(record.prompt_token_ids) // (1 if sequence.drew else 2) if sequence.started else 0
            known = prompt + len(sequence.output_token_ids)
            num_bytes += -(-known // ours.block_size) * ours.block_bytes
            # Sequences of one request share the prompt where they are, and would where it is computed again.
            num_tokens += len(sequence.output_token_ids) if num_tokens else known
        return moves_kv(target.costs or source.costs or StepCosts(), num_tokens, num_bytes)

    def _exported(self, move: _Move, report: Exported, now: float) -> list[Outgoing]:
        if not self._is_current(move):
            return self._drop(move)
        record, states = move.record, {state.request_id: state for state in report.sequences}
        if report.error is not None or not self._placer.can_take(record, move.target):
            return self._recompute(move, now)
        wanted: list[SequenceState] = []
        for sequence in record.unfinished.values():
            state = states.get(sequence.sequence_id)
            if state is None or state.num_output_tokens != len(sequence.output_token_ids):
                return self._recompute(move, now)
            wanted.append(state)
            move.computed[sequence.index] = state.num_computed_tokens
            for kv in state.kv:
                move.num_bytes["host" if kv.server is None else "device"] += kv.total_bytes
        move.ids = self._requests.new_ids(record)
        move.num_moves = record.num_moves
        requests = list(add_commands(record, now, move.ids))
        move.target.was_sent(record)
        return [to(move.target, ImportRequests(handover=move.number, requests=requests, states=wanted))]

    def _imported(self, move: _Move, report: Imported, now: float) -> list[Outgoing]:
        if not self._is_current(move):
            return self._drop(move)
        if report.error is not None:
            return self._give_up(move, now) if report.is_full else self._recompute(move, now)
        if not self._placer.can_take(move.record, move.target):
            # It drains since, and may have been told to be empty.
            return self._give_up(move, now)
        self._end(move)
        self._counts.bring(move.cause, move.num_bytes, now - move.asked_at)
        gone = [sequence_id for index, sequence_id in move.ids.items() if index not in move.record.unfinished]
        self._placer.adopt(move.record, move.target, move.ids, move.computed, now)
        move.record.num_import_deaths = 0
        # What a client aborted meanwhile was not aborted there.
        aborts = [to(move.target, AbortRequest(request_ids=gone))] if gone else []
        return [*aborts, to(move.source, EndExport(handover=move.number, moved=True))]

    def _is_current(self, move: _Move) -> bool:
        """Whether the request still runs, at the source, and knows of no other move."""
        record = move.record
        at_source = record.replica_id == move.source.replica_id and record.num_moves == move.num_moves
        return bool(record.unfinished) and at_source

    def _drop(self, move: _Move) -> list[Outgoing]:
        """The request has ended, or is somewhere else."""
        self._end(move)
        self._counts.fail(move.cause, "ended")
        return [*self._abort_import(move), to(move.source, EndExport(handover=move.number, moved=True))]

    def _recompute(self, move: _Move, now: float) -> list[Outgoing]:
        """Its KV cannot be had: it goes without."""
        out = self._drop_failed(move)
        if self._placer.can_take(move.record, move.target):
            self._counts.fail(move.cause, "recomputed")
            return out + self._placer.move(move.record, move.target, now)
        return out + self._stay(move, now)

    def _give_up(self, move: _Move, now: float) -> list[Outgoing]:
        """It goes on where it is; from a draining replica it goes elsewhere, if it can, without its KV."""
        was_current = self._is_current(move)
        out = self._drop_failed(move)
        if was_current:
            return out + self._stay(move, now)
        self._counts.fail(move.cause, "ended")
        return out

    def _stay(self, move: _Move, now: float) -> list[Outgoing]:
        out = self._placer.flee(move.record, now) if move.source.state is ReplicaState.DRAINING else []
        self._counts.fail(move.cause, "recomputed" if move.record.replica_id != move.source.replica_id else "stayed")
        return out

    def _drop_failed(self, move: _Move) -> list[Outgoing]:
        self._end(move)
        return [*self._abort_import(move), to(move.source, EndExport(handover=move.number, moved=False))]

    def _abort_import(self, move: _Move) -> list[Outgoing]:
        if not move.ids or not move.target.is_alive:
            return []
        return [to(move.target, AbortRequest(request_ids=list(move.ids.values())))]
