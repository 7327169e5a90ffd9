"""Admission, dispatch, and the bookkeeping of every running request, without sockets or a clock."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from peft_dist.core.config import ModelInfo
from peft_dist.core.errors import EngineDeadError, InvalidRequestError
from peft_dist.core.messages import (
    AdapterResult,
    AnyReport,
    Exported,
    Fatal,
    Heartbeat,
    Imported,
    Progress,
    Ready,
    ReplicaStats,
    Shutdown,
    Started,
    Warmth,
)
from peft_dist.core.succession import DrainKept, NamesKept, life_of
from peft_dist.orchestrator.adapter_calls import AdapterCalls, to
from peft_dist.orchestrator.adapters import AdapterRegistry
from peft_dist.orchestrator.admission import check_prompt, check_token_parameters, resolve_max_tokens
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.demand import Demand
from peft_dist.orchestrator.endings import Endings
from peft_dist.orchestrator.events import (
    AdapterRefused,
    Event,
    ReplicaDrained,
    ReplicaReady,
    StartReplica,
)
from peft_dist.orchestrator.handover import Handover
from peft_dist.orchestrator.lifecycle import Lifecycle
from peft_dist.orchestrator.losses import Losses
from peft_dist.orchestrator.migration import Migration
from peft_dist.orchestrator.move_counts import DRAIN, PLAN, MoveCounts
from peft_dist.orchestrator.options import OrchestratorOptions
from peft_dist.orchestrator.placer import Placer
from peft_dist.orchestrator.records import Fault, Outgoing, Replica, ReplicaState, RequestRecord
from peft_dist.orchestrator.replicas import ReplicaTable
from peft_dist.orchestrator.requests import RequestTable, ending
from peft_dist.orchestrator.room import Room

__all__ = ["Orchestrator", "OrchestratorOptions"]
_USUAL = (Progress, Started)


class Orchestrator:
    """A state machine: calls return the commands to send, ``drain_events`` what clients must hear of.

    Every request that ``submit`` accepts ends exactly once: each of its sequences with a ``finish_reason``,
    or those that are left together with ``RequestFailed``.
    """

    def __init__(self, options: OrchestratorOptions) -> None:
        self.adapters = AdapterRegistry()
        self.replicas = ReplicaTable(options.first_number)
        self._requests = RequestTable(options.prefix_caching)
        self._demand = Demand()
        self._options = options
        self._seeds = random.Random(options.seed)
        self.life = life_of(options.first_number)
        self.room = Room(options, self._requests, self.replicas)
        self._events: list[Event] = []
        self._endings = Endings(self._requests, self.adapters, self._demand, self.room, self._events)
        self.equal_steps = self._endings.equal_steps
        self._calls = AdapterCalls(self.adapters, self.replicas, self._events, options.first_number)
        tables = self._requests, self.replicas, self._calls
        counts = MoveCounts()
        self.migration = Migration(options, *tables, self.adapters, self._demand, self._events, counts)
        lengths, hosting = self._demand.lengths, self.migration.hosting
        self._placer = Placer(*tables, options.max_num_seqs, lengths, hosting, self._events)
        self.handover = Handover(self._requests, self.replicas, self._placer, options, counts)
        self._placer.mover = partial(self.handover.begin, cause=DRAIN)
        self._placer.under_way = self.handover.under_way
        self.migration.mover = partial(self.handover.move_record, cause=PLAN)
        self.migration.drop_waiting = partial(self.handover.drop_waiting, PLAN)
        self.lives = Lifecycle(self.replicas, options)
        self._losses = Losses(*tables, self._placer, self.handover, self.lives, self._endings, self._events)
        self._endings.elsewhere = self._losses.go_elsewhere

    # What clients ask

    def submit(self, new: NewRequest, now: float) -> list[Outgoing]:
        """Admit a request and send its sequences to a replica.

        Raises:
            UnknownModelError, InvalidRequestError, QueueFullError, EngineDeadError: it was not admitted.
        """
        model = self.model
        adapter = self.adapters.resolve(new.model)
        check_prompt(new.prompt_token_ids, model)
        check_token_parameters(new.params, model)
        params = resolve_max_tokens(len(new.prompt_token_ids), new.params, model)
        if new.request_id in self._requests:
            raise InvalidRequestError(f"request_id {new.request_id!r} is in use: ids are unique", param="request_id")
        self._check_open()
        self._check_ready()
        self.room.check(new.prompt_token_ids, params)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        record = RequestRecord(new.request_id, list(new.prompt_token_ids), params, seed, adapter, now)
        if self._placer.is_hopeless(record):
            raise EngineDeadError(f"No replica can run the adapter {new.model!r} now: load it again, or try later.")
        self._requests.open(record, now)
        self.adapters.acquire(adapter)
        self._demand.arrived(record, now)
        return self._placer.place(record, now)

    def abort(self, request_id: str, now: float, sequence_index: int | None = None) -> list[Outgoing]:
        """End a request, or one sequence of it, as "abort"; what is unknown or finished is ignored."""
        out: list[Outgoing] = []
        for record, sequence in self._requests.running(request_id, sequence_index):
            out += self._placer.stop(record, sequence)
            self._endings.finish(record, sequence, ending(sequence, "abort"), now)
        return out + self._losses.place_waiting(now) + self._note_drained(now) + self._calls.tidy()

    def load_adapter(
        self, name: str, path: str, *, replace: bool = False, pinned: bool | None = None, **source: Any
    ) -> tuple[int, list[Outgoing]]:
        """Ask every replica to load; ``AdapterLoaded`` or ``AdapterRefused`` with the returned call id follows.

        ``pinned``: Keep it on the device; None: if what it replaces is kept there. ``source``: Fields of
        ``LoadAdapter`` that say where it may come from.

        Raises:
            AdapterError: the name cannot be used.
            EngineDeadError: no replica is ready, or the server is stopping.
        """
        self._check_open()
        self.adapters.check_new_name(name, replace=replace)
        self._check_ready()
        return self._calls.load(name, path, pinned, **source)

    def unload_adapter(self, name: str) -> list[Outgoing]:
        """New requests are refused at once; the replicas drop the content when its last request has ended. Until then
        those that come are brought it.

        Raises:
            UnknownModelError: no adapter has this name.
        """
        self.adapters.remove(name)
        self._demand.forget(self.adapters.needed())
        return self._calls.tidy()

    def drain_replica(self, replica_id: int, now: float, *, restart: bool = False) -> list[Outgoing]:
        """Give a replica no new requests and move those it has; ``ReplicaDrained`` follows when it has none left.

        What no other replica can run finishes on it. With ``restart`` it then ends, and is started again, or is
        gone if it had joined.

        Raises:
            UnknownReplicaError, ReplicaStateError: as of ``Lifecycle.drain``.
        """
        replica = self.lives.drain(replica_id, leave=restart)
        kept = [] if restart else [self.lives.tell_drained(replica, is_drained=True)]
        return kept + self._placer.evacuate(now) + self._note_drained(now)

    def resume_replica(self, replica_id: int, now: float) -> list[Outgoing]:
        """Let a draining or drained replica take requests again; one that is started again, once it is ready.

        Raises:
            UnknownReplicaError, ReplicaStateError: there is no such replica, or it does not drain (any more).
        """
        replica = self.lives.resume(replica_id)
        if replica.state is not ReplicaState.READY:
            # It is told when it has come.
            return []
        kept = self.lives.tell_drained(replica, is_drained=False)
        # What another one drains of may have waited for this one's adapters.
        moved = self._placer.evacuate(now) + self._note_drained(now)
        return [kept, *self._calls.welcome(replica), *self._losses.place_waiting(now), *moved]

    def drain(self) -> None:
        """Admit nothing any more; what runs goes on."""
        self.lives.is_stopping = True

    def shut_down(self) -> list[Outgoing]:
        """Fail what runs, and tell every replica to exit; what they say from now on is ignored."""
        self.lives.is_stopping = True
        error = EngineDeadError("The server shut down before this was complete: send it again later.")
        self._endings.fail(self._requests.records(), error)
        self._events.extend(AdapterRefused(call_id, error) for call_id in self.adapters.cancel_loads())
        alive = self.replicas.all_alive()
        for replica in self.replicas.all():
            self.replicas.mark_dead(replica, error)
        return [to(replica, Shutdown()) for replica in alive]

    # What happens

    def add_replica(self, replica_id: int, now: float, start_timeout: float | None = None) -> Replica:
        """Enter a replica that is being started, or started again after it was lost. Raises ConfigError before that."""
        return self.replicas.add(replica_id, None if start_timeout is None else now + start_timeout)

    def lose_replica(
        self, replica_id: int, epoch: int, reason: str, now: float, *, hangs: bool = False, by_link: bool = False
    ) -> list[Outgoing]:
        """Give a replica up: it is told to exit in case it still listens, and other replicas go on with its requests.

        Those that no replica can go on with fail. ``hangs``: It will not end by itself. ``by_link``: What failed is its
        connection: no request is to blame, and it goes on as another incarnation (``ReplicaRenewed``). Ignored for an
        earlier incarnation, or a second time.
        """
        replica = self.replicas.alive(replica_id, epoch)
        return [] if replica is None else self._give_up(replica, Fault(reason, hangs, by_link), now)

    def observe(self, replica_id: int, epoch: int, report: AnyReport, now: float) -> list[Outgoing]:
        """Take in a replica's report; those of a fenced or dead incarnation are ignored."""
        replica = self.replicas.alive(replica_id, epoch)
        if replica is None:
            return []
        replica.last_heard = now
        out: list[Outgoing] = []
        match report:
            case Progress():
                out = self._observe_progress(replica, report, now)
            case Started(request_ids=ids):
                self._requests.note_started(ids, replica_id)
            case Heartbeat():
                if (fault := self.lives.find_fault(replica, report)) is not None:
                    out = self._give_up(replica, fault, now)
            case Warmth(is_warm=is_warm, pause=pause):
                replica.is_warm, replica.pause = is_warm, pause
            case Ready(model=model):
                misfit = self.replicas.misfit(replica, model)
                if misfit is not None:
                    return self._give_up(replica, Fault(misfit, is_misfit=True), now)
                out = self._observe_ready(replica, report, now)
            case AdapterResult():
                out = (
                    self._calls.answered(replica, report, now)
                    + self._losses.place_waiting(now)
                    + self._placer.evacuate(now)
                )
            case NamesKept(version=version):
                replica.names_version = version
            case DrainKept():
                self.lives.hear_drained(replica, self._events)
            case Exported() | Imported():
                out = self.handover.observe(replica, report, now)
            case Fatal():
                out = self.lose_replica(replica_id, epoch, report.error, now)
        # Progress leaves nothing else to be tidied up, and a start nothing at all.
        is_tidy = isinstance(report, _USUAL) and not self.adapters.has_unneeded
        return out + self._note_drained(now) + ([] if is_tidy else self._calls.tidy())

    def tick(self, now: float) -> list[Outgoing]:
        """Act on deadlines that passed; ``next_deadline`` tells when the next one does.

        Replicas that are not ready in time, or silent for too long, are lost; those that waited for it are started.
        """
        out = self.handover.tick(now) + self._calls.tick(now)
        for lost, fault in self.lives.lost_by(now):
            out += self._give_up(lost, fault, now)
        for dead in self.lives.due(now):
            replica = self.add_replica(dead.replica_id, now, self._options.start_timeout)
            self._events.append(StartReplica(replica.replica_id, replica.epoch))
        for record in self._requests.unplaced():
            if record.waits_since + self._options.max_wait <= now:
                why = f"No replica could go on with this in time. {self._losses.why_in_vain(record)}"
                self._endings.fail([record], EngineDeadError(why))
        return out + self._losses.tick(now) + self.migration.tick(now) + self._calls.tidy()

    def next_deadline(self) -> float:
        """When ``tick`` has something to do, if nothing happens before; infinity for never."""
        parts = self.lives, self.handover, self.migration, self._calls, self._losses
        first = min([part.next_deadline() for part in parts])
        if not self._requests.has_unplaced:
            return first
        waiting = [record.waits_since + self._options.max_wait for record in self._requests.unplaced()]
        return min(first, *waiting)

    def drain_events(self) -> list[Event]:
        """What happened since the last call, in order."""
        events = self._events[:]
        self._events.clear()
        return events

    # What can be asked

    @property
    def model(self) -> ModelInfo:
        """Raises EngineDeadError before the first replica was ready."""
        return self.replicas.model()

    @property
    def health_error(self) -> str | None:
        """Why no request can be served now, or None."""
        return None if self.replicas.ready() else self.replicas.health_error()

    @property
    def num_unfinished(self) -> int:
        """Sequences that wait or run."""
        return self._requests.num_sequences

    def stats(self) -> ReplicaStats:
        """The last report of a ready replica, or of the last known one when none is ready."""
        return self.replicas.stats()

    # Inside

    def _give_up(self, replica: Replica, fault: Fault, now: float) -> list[Outgoing]:
        return self._losses.lose(replica, fault, now) + self._calls.tidy()

    def _check_open(self) -> None:
        if self.lives.is_stopping:
            raise EngineDeadError("The server is shutting down: send the request to another one, or later.")

    def _check_ready(self) -> None:
        if (error := self.health_error) is not None:
            raise EngineDeadError(error)

    def _observe_progress(self, replica: Replica, report: Progress, now: float) -> list[Outgoing]:
        self.replicas.take_in(replica, report, now)
        broken = self._endings.advance(report.sequences, replica, now)
        return [out for each in broken for out in self._placer.stop(*each)] + self._losses.place_waiting(now)

    def _observe_ready(self, replica: Replica, report: Ready, now: float) -> list[Outgoing]:
        self.replicas.mark_ready(replica, report, now)
        kept = self.lives.keep_drained(replica, report, self._events)
        self.adapters.set_base(report.model)
        self._events.append(ReplicaReady(replica.replica_id, report.model))
        named = self._calls.take_in(replica, report)
        return (
            kept + named + self._calls.welcome(replica) + self._losses.place_waiting(now) + self._placer.evacuate(now)
        )

    def _note_drained(self, now: float) -> list[Outgoing]:
        """Tell of replicas that have become empty, and let those go that are to be started again."""
        draining = self.replicas.draining()
        if not draining:
            return []
        empty = [replica for replica in draining if not self._requests.load(replica)]
        for replica in empty:
            self.lives.drained(replica)
            self._events.append(ReplicaDrained(replica.replica_id, replica.leaves))
        out = [to(replica, Shutdown()) for replica in empty if replica.leaves]
        for guest in (replica for replica in empty if replica.leaves and replica.is_guest):
            # No process of ours, whose end would be noticed.
            out += self.lose_replica(guest.replica_id, guest.epoch, f"Replica {guest.replica_id} has left.", now)
        return out
