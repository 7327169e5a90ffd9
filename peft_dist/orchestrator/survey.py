"""One look at all requests for a plan, a few at a time, so that thousands hold up nobody."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import msgspec

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import ModelInfo
from peft_dist.orchestrator.dispatcher import Lengths
from peft_dist.orchestrator.records import Replica, RequestRecord
from peft_dist.orchestrator.replicas import ReplicaTable
from peft_dist.orchestrator.requests import RequestTable
from peft_dist.orchestrator.views import Views
from peft_dist.placement.aggregation import Grouping, RequestLoad, expected_tokens
from peft_dist.placement.types import ClusterView

# Requests that are looked at in one go: about half a millisecond.
SLICE = 100


class Surveyed(NamedTuple):
    """What a plan is made of, and what it is carried out with.

    ``members`` are the ids of the requests in each class. ``num_moves`` is how often each had been moved when it was
    seen: if that is another number by then, somebody else has moved it.
    """

    view: ClusterView
    members: list[list[str]]
    num_moves: dict[str, int]


class Survey:
    """Requests may come, move and end between two calls of ``step``: a plan is checked again when it is carried out."""

    def __init__(self, requests: RequestTable, replicas: ReplicaTable, lengths: Lengths, views: Views) -> None:
        self._replicas = replicas
        self._lengths = lengths
        self._views = views
        self._left = iter(requests.records())
        self._grouping = Grouping()
        self._num_moves: dict[str, int] = {}
        self._used: dict[str, AdapterSpec] = {}

    def step(self) -> bool:
        """Look at some more; False when all were looked at."""
        some = list(itertools.islice(self._left, SLICE))
        for record in some:
            replica = None if record.replica_id is None else self._replicas.get(record.replica_id)
            # A suspect stays where it is tried.
            if replica is not None and replica.model is not None and record.unfinished and not record.is_suspect:
                self._add(record, replica, replica.model)
        return len(some) == SLICE

    def result(self, now: float) -> Surveyed:
        """The view, once all were looked at."""
        classes, members = self._grouping.result()
        ids = {replica.replica_id for replica in self._replicas.ready()}
        # Without those of replicas that were lost, or drained, meanwhile.
        kept = [index for index, one in enumerate(classes) if one.source in ids]
        adapters = self._views.adapters(now, self._used.values())
        view = self._views.planning(adapters, [classes[index] for index in kept])
        return Surveyed(view, [members[index] for index in kept], self._num_moves)

    def _add(self, record: RequestRecord, replica: Replica, model: ModelInfo) -> None:
        if record.adapter is not None:
            self._used[record.content_hash] = record.adapter
        self._num_moves[record.request_id] = record.num_moves
        load = request_load(record, replica.replica_id, self._lengths.mean(record), model.block_size)
        kv_bytes = model.block_bytes * load.kv_blocks if load.context_tokens else 0
        self._grouping.add(msgspec.structs.replace(load, kv_bytes=kv_bytes))


def request_load(record: RequestRecord, replica_id: int, mean_tokens: float, block_size: int) -> RequestLoad:
    """A request with all its sequences, which move together. ``mean_tokens``: Of its adapter's outputs."""
    prompt, most = len(record.prompt_token_ids), record.params.max_tokens or 0
    prefill = context = blocks = 0
    decode = 0.0
    for sequence in record.unfinished.values():
        drawn = len(sequence.output_token_ids)
        prefill += sequence.owed_prefill
        # What was moved here and has drawn nothing yet is all to be computed.
        context += prompt + drawn if sequence.drew else 0
        blocks += (prompt + drawn) // block_size + 1
        decode += expected_tokens(drawn, most, mean_tokens)
    return RequestLoad(record.request_id, replica_id, record.content_hash, prefill, decode, context, blocks)
