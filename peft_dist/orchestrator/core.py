"""Admission, dispatch, and the bookkeeping of every running request, without sockets or a clock."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import ModelInfo
from peft_dist.core.errors import ConfigError, EngineDeadError, InvalidRequestError, QueueFullError
from peft_dist.core.messages import (
    AbortRequest,
    AdapterResult,
    AnyCommand,
    AnyReport,
    Fatal,
    LoadAdapter,
    PinAdapter,
    Progress,
    Ready,
    ReplicaStats,
    SequenceProgress,
    Shutdown,
    UnloadAdapter,
)
from peft_dist.orchestrator.adapters import AdapterRegistry
from peft_dist.orchestrator.admission import check_prompt, check_token_parameters, resolve_max_tokens
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.pace import Pace
from peft_dist.orchestrator.records import (
    AdapterLoaded,
    AdapterRefused,
    Event,
    Notice,
    Outgoing,
    Replica,
    ReplicaLost,
    ReplicaReady,
    ReplicaState,
    RequestFailed,
    RequestRecord,
    SequenceEvent,
    SequenceRecord,
)
from peft_dist.orchestrator.replicas import ReplicaTable
from peft_dist.orchestrator.requests import RequestTable, add_command, ending, unseen_part


@dataclass(frozen=True, slots=True)
class OrchestratorOptions:
    """
    Attributes:
        max_num_seqs: Sequences that one replica runs at once.
        max_queue: Sequences that may wait beyond those; one more is refused.
        seed: Seeds the seeds of requests that bring none; None draws from the system.
    """

    max_num_seqs: int = 256
    max_queue: int = 1024
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_queue < 0:
            raise ConfigError(f"max_queue={self.max_queue} must be 0 (nothing waits) or more")


class Orchestrator:
    """A state machine: calls return the commands to send, ``drain_events`` what clients must hear of.

    Every request that ``submit`` accepts ends exactly once: each of its sequences with a ``finish_reason``,
    or those that are left together with ``RequestFailed``.
    """

    def __init__(self, options: OrchestratorOptions) -> None:
        self.adapters = AdapterRegistry()
        self.replicas = ReplicaTable()
        self._requests = RequestTable()
        self._options = options
        self._seeds = random.Random(options.seed)
        self._pace = Pace()
        self._model: ModelInfo | None = None
        self._events: list[Event] = []
        self._next_call = 1
        self._stopping = False

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
        replica = self.replicas.choose(self._requests.load)
        self._check_room(params.n)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        record = RequestRecord(new.request_id, list(new.prompt_token_ids), params, seed, adapter, now)
        self._requests.open(record, replica)
        self.adapters.acquire(adapter)
        return [_to(replica, add_command(record, sequence)) for sequence in record.unfinished.values()]

    def abort(self, request_id: str, now: float, sequence_index: int | None = None) -> list[Outgoing]:
        """End a request, or one sequence of it, as "abort"; what is unknown or finished is ignored."""
        out: list[Outgoing] = []
        for record, sequence in self._requests.running(request_id, sequence_index):
            out.append(self._abort_command(sequence))
            self._finish(record, sequence, ending(sequence, "abort"), now)
        return out + self._drop_unused()

    def load_adapter(
        self,
        name: str,
        path: str,
        *,
        replace: bool = False,
        allow_hub: bool = False,
        root: str | None = None,
        allow_pickle: bool = False,
        pinned: bool | None = None,
    ) -> tuple[int, list[Outgoing]]:
        """Ask every replica to load; ``AdapterLoaded`` or ``AdapterRefused`` with the returned call id follows.

        ``pinned``: Keep it on the device; None: if what it replaces is kept there.

        Raises:
            AdapterError: the name cannot be used.
            EngineDeadError: no replica is ready, or the server is stopping.
        """
        self._check_open()
        self.adapters.check_new_name(name, replace=replace)
        self.replicas.choose(self._requests.load)
        replicas = self.replicas.ready()
        call_id = self._new_call()
        pin = self.adapters.begin_load(call_id, name, {replica.replica_id for replica in replicas}, pinned)
        command = LoadAdapter(
            call_id=call_id, name=name, path=path, root=root, allow_hub=allow_hub, allow_pickle=allow_pickle, pinned=pin
        )
        return call_id, [_to(replica, command) for replica in replicas]

    def unload_adapter(self, name: str) -> list[Outgoing]:
        """New requests are refused at once; the replicas drop the content when its last request has ended.

        Raises:
            UnknownModelError: no adapter has this name.
        """
        self.adapters.remove(name)
        return self._drop_unused()

    def drain(self) -> None:
        """Admit nothing any more; what runs goes on."""
        self._stopping = True

    def shut_down(self) -> list[Outgoing]:
        """Fail what runs, and tell every replica to exit; what they say from now on is ignored."""
        self._stopping = True
        error = EngineDeadError("The server shut down before this was complete: send it again later.")
        self._fail(self._requests.records(), error)
        self._events.extend(AdapterRefused(call_id, error) for call_id in self.adapters.cancel_loads())
        alive = self.replicas.all_alive()
        for replica in alive:
            self.replicas.mark_dead(replica, error)
        return [_to(replica, Shutdown()) for replica in alive]

    # What happens

    def add_replica(self, replica_id: int, now: float, start_timeout: float | None = None) -> Replica:
        """Enter a replica that is being started, or started again after it was lost."""
        earlier = self.replicas.get(replica_id)
        if earlier is not None and earlier.state is not ReplicaState.DEAD:
            raise ConfigError(f"replica {replica_id} is still {earlier.state.value}: it cannot be started again")
        return self.replicas.add(replica_id, None if start_timeout is None else now + start_timeout)

    def lose_replica(self, replica_id: int, epoch: int, reason: str) -> list[Outgoing]:
        """Give a replica up: its requests and loads fail, and it is told to exit in case it still listens.

        Ignored for an earlier incarnation, or a second time.
        """
        replica = self.replicas.alive(replica_id, epoch)
        if replica is None:
            return []
        error = EngineDeadError(reason)
        self.replicas.mark_dead(replica, error)
        self._fail(self._requests.on_replica(replica_id), error)
        for call_id in self.adapters.loads_on(replica_id):
            self._settle(call_id, replica_id, None, error)
        self._events.append(ReplicaLost(replica_id, error))
        return [_to(replica, Shutdown()), *self._drop_unused()]

    def observe(self, replica_id: int, epoch: int, report: AnyReport, now: float) -> list[Outgoing]:
        """Take in a replica's report; those of a fenced or dead incarnation are ignored."""
        replica = self.replicas.alive(replica_id, epoch)
        if replica is None:
            return []
        out: list[Outgoing] = []
        match report:
            case Progress():
                out = self._observe_progress(replica, report, now)
            case Ready():
                self._observe_ready(replica, report)
            case AdapterResult():
                self._observe_adapter(replica, report)
            case Fatal():
                out = self.lose_replica(replica_id, epoch, report.error)
        return out + self._drop_unused()

    def tick(self, now: float) -> list[Outgoing]:
        """Act on deadlines that passed: a replica that is not ready in time is given up and told to exit."""
        out: list[Outgoing] = []
        for replica in self.replicas.late(now):
            reason = f"Replica {replica.replica_id} was not ready in time."
            out += self.lose_replica(replica.replica_id, replica.epoch, reason)
        return out

    def drain_events(self) -> list[Event]:
        """What happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    # What can be asked

    @property
    def model(self) -> ModelInfo:
        """Raises EngineDeadError before the first replica was ready."""
        if self._model is None:
            raise EngineDeadError(self.replicas.health_error())
        return self._model

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

    def _check_open(self) -> None:
        if self._stopping:
            raise EngineDeadError("The server is shutting down: send the request to another one, or later.")

    def _check_room(self, num_sequences: int) -> None:
        room = len(self.replicas.ready()) * self._options.max_num_seqs + self._options.max_queue
        if num_sequences > room:
            raise InvalidRequestError(f"n={num_sequences} is more than the {room} sequences this server holds", "n")
        excess = self.num_unfinished + num_sequences - room
        if excess > 0:
            raise QueueFullError(
                f"The queue is full: {self.num_unfinished} of {room} sequences wait or run. Try again later.",
                retry_after=self._pace.seconds_for(excess),
            )

    def _new_call(self) -> int:
        call_id, self._next_call = self._next_call, self._next_call + 1
        return call_id

    def _abort_command(self, sequence: SequenceRecord) -> Outgoing:
        return _to(self.replicas[sequence.replica_id], AbortRequest(request_ids=[sequence.sequence_id]))

    def _finish(self, record: RequestRecord, sequence: SequenceRecord, last: SequenceProgress, now: float) -> None:
        self._events.append(SequenceEvent(record.request_id, sequence.index, last))
        if self._requests.close(record, sequence):
            self.adapters.release(record.adapter)
        self._pace.ended(now)
        if not self.num_unfinished:
            self._pace.idle()

    def _fail(self, records: Iterable[RequestRecord], error: EngineDeadError) -> None:
        for record in records:
            for sequence in list(record.unfinished.values()):
                self._requests.close(record, sequence)
            self.adapters.release(record.adapter)
            self._events.append(RequestFailed(record.request_id, error))

    def _observe_progress(self, replica: Replica, report: Progress, now: float) -> list[Outgoing]:
        self.replicas.take_in(replica, report)
        out: list[Outgoing] = []
        for progress in report.sequences:
            owner = self._requests.owner(progress.request_id, replica.replica_id)
            if owner is None:
                continue  # Aborted here while the replica was still at it.
            record, sequence = owner
            try:
                new = unseen_part(sequence, progress)
            except ValueError as error:
                out.append(self._abort_command(sequence))
                new = ending(sequence, "error", str(error))
            sequence.output_token_ids.extend(new.token_ids)
            if new.finish_reason is None:
                self._events.append(SequenceEvent(record.request_id, sequence.index, new))
            else:
                self._finish(record, sequence, new, now)
        return out

    def _observe_ready(self, replica: Replica, report: Ready) -> None:
        if not self.replicas.ready():
            # It starts empty, and no other replica holds the adapters that a lost one held.
            self.adapters.forget_all()
        self.replicas.mark_ready(replica, report)
        self._model = report.model
        self.adapters.set_base(report.model)
        self._events.append(ReplicaReady(replica.replica_id, report.model))

    def _observe_adapter(self, replica: Replica, report: AdapterResult) -> None:
        if report.spec is not None:
            self.adapters.held(report.spec)
        if report.call_id in self.adapters.loads_on(replica.replica_id):
            self._settle(report.call_id, replica.replica_id, report.spec, report.error)
        elif report.error is not None:
            self._events.append(Notice(replica.replica_id, report.error))

    def _settle(
        self, call_id: int, replica_id: int, spec: AdapterSpec | None, error: EngineDeadError | str | None
    ) -> None:
        outcome = self.adapters.settle(call_id, replica_id, spec, error)
        if isinstance(outcome, AdapterSpec):
            self._events.append(AdapterLoaded(call_id, outcome))
        elif outcome is not None:
            self._events.append(AdapterRefused(call_id, outcome))

    def _drop_unused(self) -> list[Outgoing]:
        ready = self.replicas.ready()
        pins = [PinAdapter(name=name, content_hash=held) for name, held in self.adapters.take_repins()]
        out = [_to(replica, pin) for pin in pins for replica in ready]
        for content_hash in self.adapters.take_unused():
            out += [_to(r, UnloadAdapter(call_id=self._new_call(), content_hash=content_hash)) for r in ready]
        return out


def _to(replica: Replica, command: AnyCommand) -> Outgoing:
    return Outgoing(replica.replica_id, replica.epoch, command)
