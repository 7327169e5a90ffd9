"""The table of unfinished requests and their sequences, and what each replica has left to do of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from peft_dist.core.messages import AddRequest, SequenceProgress
from peft_dist.orchestrator.prefixes import Prefixes
from peft_dist.orchestrator.records import Replica, RequestRecord, SequenceRecord
from peft_dist.policy.dispatch import Backlog

_NOTHING = Backlog()


class RequestTable:
    """Every unfinished request, found by its id, by its sequences' ids, and by replica."""

    def __init__(self, prefix_caching: bool = False) -> None:
        """``prefix_caching``: Whether replicas keep the KV of prefixes."""
        self.prefixes = Prefixes(prefix_caching)
        self._records: dict[str, RequestRecord] = {}
        self._owners: dict[str, tuple[RequestRecord, SequenceRecord]] = {}
        self._backlogs: dict[int, Backlog] = {}
        self._unplaced: dict[str, RequestRecord] = {}
        self._by_replica: dict[int, dict[str, RequestRecord]] = {}
        self._num_opened = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._records

    @property
    def num_sequences(self) -> int:
        """Unfinished sequences of all requests."""
        return len(self._owners)

    def load(self, replica: Replica) -> int:
        """Unfinished sequences of a replica."""
        return self.backlog(replica.replica_id).num_sequences

    def backlog(self, replica_id: int) -> Backlog:
        """What a replica has left to do; not to be changed."""
        return self._backlogs.get(replica_id, _NOTHING)

    def backlogs(self, replicas: Iterable[Replica]) -> list[Backlog]:
        """``backlog`` of each."""
        known = self._backlogs
        return [known.get(replica.replica_id, _NOTHING) for replica in replicas]

    def keep_late(self, replica_id: int, refresh: Callable[[], None]) -> None:
        """A replica's backlog is brought up to date by this, before its tokens count."""
        self._backlogs.setdefault(replica_id, Backlog()).refresh = refresh

    def get(self, request_id: str) -> RequestRecord | None:
        """The unfinished request with this id."""
        return self._records.get(request_id)

    def waiting(self) -> Iterator[RequestRecord]:
        """Requests of which no sequence is in a batch of its replica yet, oldest first."""
        return (r for r in self._records.values() if not r.has_started)

    def records(self) -> list[RequestRecord]:
        """All unfinished requests, oldest first."""
        return list(self._records.values())

    def unplaced(self) -> list[RequestRecord]:
        """Requests that no replica has, oldest first."""
        return sorted(self._unplaced.values(), key=lambda record: record.arrival_time)

    @property
    def has_unplaced(self) -> bool:
        return bool(self._unplaced)

    def on_replica(self, replica_id: int) -> list[RequestRecord]:
        """Requests that a replica has, oldest first."""
        # They came to it in another order where some were moved.
        return sorted(self._by_replica.get(replica_id, {}).values(), key=lambda record: record.number)

    def running(self, request_id: str, index: int | None = None) -> list[tuple[RequestRecord, SequenceRecord]]:
        """The unfinished sequences of a request, or the one at ``index``."""
        record = self._records.get(request_id)
        if record is None:
            return []
        return [(record, s) for s in record.unfinished.values() if index is None or s.index == index]

    def owner(self, sequence_id: str, replica_id: int) -> tuple[RequestRecord, SequenceRecord] | None:
        """Request and sequence of an id, if the replica owns it and it is unfinished."""
        owner = self._owners.get(sequence_id)
        return owner if owner is not None and owner[0].replica_id == replica_id else None

    def note_started(self, sequence_ids: Iterable[str], replica_id: int) -> None:
        """The replica said that these are in a batch; of those that it owns it is noted."""
        for sequence_id in sequence_ids:
            if owner := self.owner(sequence_id, replica_id):
                owner[1].started = True

    def open(self, record: RequestRecord, now: float) -> None:
        """Enter a request with ``params.n`` sequences, which no replica has yet."""
        self._records[record.request_id] = self._unplaced[record.request_id] = record
        record.waits_since, record.number = now, self._num_opened
        self._num_opened += 1
        for index in range(record.params.n):
            sequence = SequenceRecord(f"{record.request_id}-{index}", index)
            record.unfinished[index] = sequence
            self._owners[sequence.sequence_id] = (record, sequence)

    def place(
        self, record: RequestRecord, replica_id: int, expected_output: float, computed: Mapping[int, int] | None = None
    ) -> None:
        """Give a request to a replica.

        Args:
            expected_output: Tokens that one of its sequences is expected to have.
            computed: Tokens whose KV it has there already, by sequence.
        """
        del self._unplaced[record.request_id]
        record.replica_id = replica_id
        self._by_replica.setdefault(replica_id, {})[record.request_id] = record
        backlog = self._backlogs.setdefault(replica_id, Backlog())
        shared = 0
        for sequence in record.unfinished.values():
            prefill = max(len(record.prompt_token_ids) - shared, 0) + len(sequence.output_token_ids)
            sequence.owed_prefill = max(prefill - (computed or {}).get(sequence.index, 0), 0)
            sequence.owed_output = max(expected_output - len(sequence.output_token_ids), 1.0)
            backlog.prefill_tokens += sequence.owed_prefill
            backlog.output_tokens += sequence.owed_output
            backlog.count(record.content_hash, _rank_rows(record), 1)
            shared = len(record.prompt_token_ids)

    def forecast(self, replica_id: int) -> Backlog:
        """A copy of what a replica has left to do, for ``expect``."""
        now = self.backlog(replica_id)
        return Backlog(now.num_sequences, now.prefill_tokens, now.tokens_left, dict(now.adapters))

    @staticmethod
    def expect(forecast: Backlog, record: RequestRecord, expected_output: float, *, with_kv: bool) -> None:
        """Count a request in a forecast for the replica to which it goes. ``expected_output``: As of ``place``."""
        for sequence in record.unfinished.values():
            forecast.prefill_tokens += 0 if with_kv else sequence.owed_prefill
            forecast.output_tokens += max(expected_output - len(sequence.output_token_ids), 1.0)
            forecast.count(record.content_hash, _rank_rows(record), 1)

    def new_ids(self, record: RequestRecord) -> dict[int, str]:
        """Ids that no replica ever knew, of the sequences of a request, by index."""
        record.num_moves += 1
        return {index: f"{record.request_id}-{index}~{record.num_moves}" for index in record.unfinished}

    def take(self, record: RequestRecord, now: float, ids: Mapping[int, str] | None = None) -> None:
        """Take a request from its replica. Its sequences get other ids, by which the next one will know them."""
        ids = self.new_ids(record) if ids is None else ids
        for sequence in record.unfinished.values():
            self._settle(record, sequence)
        self._leave(record)
        record.replica_id, record.waits_since, record.prefix_uses = None, now, None
        self._unplaced[record.request_id] = record
        for sequence in record.unfinished.values():
            del self._owners[sequence.sequence_id]
            sequence.sequence_id = ids[sequence.index]
            sequence.started = sequence.drew = False
            self._owners[sequence.sequence_id] = (record, sequence)

    def advance(self, record: RequestRecord, sequence: SequenceRecord, token_ids: list[int]) -> None:
        """A sequence drew tokens."""
        sequence.output_token_ids.extend(token_ids)
        if not token_ids:
            return
        if not sequence.drew:
            # Whatever counts from then on takes the sequence from its replica.
            sequence.started = sequence.drew = True
            sequence.num_deaths = sequence.num_early_deaths = sequence.num_silences = 0
            record.is_suspect = False
        if record.replica_id is not None:
            backlog = self._backlogs[record.replica_id]
            if sequence.owed_prefill:
                backlog.prefill_tokens -= sequence.owed_prefill
                sequence.owed_prefill = 0
            drawn = min(float(len(token_ids)), sequence.owed_output)
            sequence.owed_output -= drawn
            backlog.output_tokens -= drawn

    def close(self, record: RequestRecord, sequence: SequenceRecord) -> bool:
        """A sequence ended; True when it was the request's last."""
        self.prefixes.ended(record, sequence)
        self._settle(record, sequence)
        del record.unfinished[sequence.index]
        del self._owners[sequence.sequence_id]
        if record.unfinished:
            return False
        del self._records[record.request_id]
        self._unplaced.pop(record.request_id, None)
        self._leave(record)
        return True

    def _leave(self, record: RequestRecord) -> None:
        """No replica has a request any more."""
        if record.replica_id is not None:
            del self._by_replica[record.replica_id][record.request_id]

    def _settle(self, record: RequestRecord, sequence: SequenceRecord) -> None:
        """Its replica has nothing left to do for a sequence."""
        if record.replica_id is not None:
            backlog = self._backlogs[record.replica_id]
            backlog.prefill_tokens -= sequence.owed_prefill
            backlog.output_tokens -= sequence.owed_output
            backlog.count(record.content_hash, _rank_rows(record), -1)
            if not backlog.num_sequences:
                # No drift of sums of floats lasts beyond an idle moment.
                backlog.output_tokens = 0.0
        sequence.owed_prefill, sequence.owed_output = 0, 0.0


def add_commands(record: RequestRecord, now: float, ids: Mapping[int, str] | None = None) -> Iterator[AddRequest]:
    """What a replica needs to begin each sequence of a request, or to go on with it; under other ``ids`` if given."""
    for sequence in record.unfinished.values():
        yield AddRequest(
            request_id=sequence.sequence_id if ids is None else ids[sequence.index],
            prompt_token_ids=record.prompt_token_ids,
            params=record.params,
            seed=record.seed,
            sequence_index=sequence.index,
            content_hash=record.adapter.content_hash if record.adapter else None,
            output_token_ids=sequence.output_token_ids,
            age=max(now - record.arrival_time, 0.0),
        )


def _rank_rows(record: RequestRecord) -> int:
    return record.adapter.num_rank_rows if record.adapter else 0


def unseen_part(sequence: SequenceRecord, progress: SequenceProgress) -> SequenceProgress:
    """Progress without tokens that were reported before (a sequence may have been continued elsewhere).

    Raises:
        ValueError: tokens are missing between what is known and what is reported.
    """
    known = len(sequence.output_token_ids)
    seen = known - progress.first_index
    if seen < 0:
        raise ValueError(f"tokens {known} to {progress.first_index - 1} of sequence {sequence.sequence_id} were lost")
    if seen == 0:
        return progress
    return msgspec.structs.replace(
        progress,
        token_ids=progress.token_ids[seen:],
        first_index=known,
        logprobs=None if progress.logprobs is None else progress.logprobs[seen:],
    )


def ending(sequence: SequenceRecord, finish_reason: str, error: str | None = None) -> SequenceProgress:
    """The end of a sequence that its replica did not report."""
    return SequenceProgress(
        request_id=sequence.sequence_id,
        token_ids=[],
        first_index=len(sequence.output_token_ids),
        finish_reason=finish_reason,
        error=error,
    )
