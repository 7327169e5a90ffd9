"""The table of unfinished requests and their sequences."""

from __future__ import annotations

from collections import Counter

import msgspec

from peft_dist.core.messages import AddRequest, SequenceProgress
from peft_dist.orchestrator.records import Replica, RequestRecord, SequenceRecord


class RequestTable:
    """Every unfinished request, found by its id, by its sequences' ids, and by replica."""

    def __init__(self) -> None:
        self._records: dict[str, RequestRecord] = {}
        self._owners: dict[str, tuple[RequestRecord, SequenceRecord]] = {}
        self._load: Counter[int] = Counter()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._records

    @property
    def num_sequences(self) -> int:
        """Unfinished sequences of all requests."""
        return len(self._owners)

    def load(self, replica: Replica) -> int:
        """Unfinished sequences of a replica."""
        return self._load[replica.replica_id]

    def records(self) -> list[RequestRecord]:
        """All unfinished requests, oldest first."""
        return list(self._records.values())

    def on_replica(self, replica_id: int) -> list[RequestRecord]:
        """Requests that have an unfinished sequence on a replica."""
        return [
            record
            for record in self._records.values()
            if any(sequence.replica_id == replica_id for sequence in record.unfinished.values())
        ]

    def running(self, request_id: str, index: int | None = None) -> list[tuple[RequestRecord, SequenceRecord]]:
        """The unfinished sequences of a request, or the one at ``index``."""
        record = self._records.get(request_id)
        if record is None:
            return []
        return [(record, s) for s in record.unfinished.values() if index is None or s.index == index]

    def owner(self, sequence_id: str, replica_id: int) -> tuple[RequestRecord, SequenceRecord] | None:
        """Request and sequence of an id, if the replica owns it and it is unfinished."""
        owner = self._owners.get(sequence_id)
        return owner if owner is not None and owner[1].replica_id == replica_id else None

    def open(self, record: RequestRecord, replica: Replica) -> None:
        """Enter a request with ``params.n`` sequences, all on one replica (they share the prompt's KV)."""
        self._records[record.request_id] = record
        for index in range(record.params.n):
            sequence = SequenceRecord(f"{record.request_id}-{index}", index, replica.replica_id)
            record.unfinished[index] = sequence
            self._owners[sequence.sequence_id] = (record, sequence)
            self._load[replica.replica_id] += 1

    def close(self, record: RequestRecord, sequence: SequenceRecord) -> bool:
        """A sequence ended; True when it was the request's last."""
        del record.unfinished[sequence.index]
        del self._owners[sequence.sequence_id]
        self._load[sequence.replica_id] -= 1
        if record.unfinished:
            return False
        del self._records[record.request_id]
        return True


def add_command(record: RequestRecord, sequence: SequenceRecord) -> AddRequest:
    """What a replica needs to begin a sequence, or to go on with it."""
    return AddRequest(
        request_id=sequence.sequence_id,
        prompt_token_ids=record.prompt_token_ids,
        params=record.params,
        seed=record.seed,
        sequence_index=sequence.index,
        content_hash=record.adapter.content_hash if record.adapter else None,
        output_token_ids=sequence.output_token_ids,
    )


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
