"""What is asked of each adapter: how often, and for how many tokens."""

from __future__ import annotations

from collections.abc import Set

from peft_dist.orchestrator.dispatcher import FIRST_GUESS, Lengths
from peft_dist.orchestrator.records import RequestRecord, SequenceRecord
from peft_dist.placement.costs import ReplicaCosts
from peft_dist.placement.rates import ArrivalRates

# Work of adapters is compared with one another only: any replica's seconds will do.
_COSTS = ReplicaCosts()


class Demand:
    """Lengths and arrival rates by content hash, "" for the base. A request for ``n`` sequences counts as ``n``."""

    def __init__(self) -> None:
        self.lengths = Lengths()
        self.rates = ArrivalRates(default_work=FIRST_GUESS * _COSTS.decode_token)
        self._known: set[str] = set()

    def arrived(self, record: RequestRecord, now: float) -> None:
        """A request was admitted."""
        self._known.add(record.content_hash)
        for _ in record.unfinished:
            self.rates.arrived(record.content_hash, now)

    def ended(self, record: RequestRecord, sequence: SequenceRecord, now: float) -> None:
        """One of its sequences has all its tokens."""
        num_tokens = len(sequence.output_token_ids)
        self.lengths.ended(record.content_hash, num_tokens)
        work = len(record.prompt_token_ids) * _COSTS.prefill_token + num_tokens * _COSTS.decode_token
        self.rates.finished(record.content_hash, work, now)

    def forget(self, needed: Set[str]) -> None:
        """Keep nothing of adapters that are gone."""
        self.lengths.forget(set(needed))
        for content_hash in self._known - needed - {""}:
            self.rates.forget(content_hash)
            self._known.discard(content_hash)
