"""Who takes a request, in terms of the orchestrator's tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from peft_dist.core.step_costs import StepCosts
from peft_dist.orchestrator.records import Replica, RequestRecord
from peft_dist.orchestrator.requests import RequestTable
from peft_dist.policy.dispatch import Target, Work, choose

_WEIGHT = 0.1
# Of requests that nothing is known of; long enough to count, shorter than most limits.
FIRST_GUESS = 64.0


class Lengths:
    """Moving averages of how many tokens the sequences of an adapter have in the end."""

    def __init__(self) -> None:
        self._means: dict[str, float] = {}

    def ended(self, content_hash: str, num_tokens: int) -> None:
        mean = self._means.get(content_hash, FIRST_GUESS)
        self._means[content_hash] = mean + _WEIGHT * (num_tokens - mean)

    def mean(self, record: RequestRecord) -> float:
        """Tokens of one sequence of a request's adapter when it ends."""
        return self._means.get(record.content_hash, FIRST_GUESS)

    def expected(self, record: RequestRecord) -> float:
        """Tokens of one sequence of a request when it ends."""
        return min(self.mean(record), float(record.params.max_tokens or 0))

    def forget(self, needed: set[str]) -> None:
        """Keep nothing of adapters that are gone."""
        self._means = {content: mean for content, mean in self._means.items() if content in needed or not content}


class Dispatcher:
    """Estimates for ``policy.dispatch`` from what was sent to replicas and what they reported."""

    def __init__(
        self, requests: RequestTable, lengths: Lengths, max_num_seqs: int, is_placed: Callable[[str, int], bool]
    ) -> None:
        """``is_placed``: Whether a content is to be at hand on a replica, and so is, or soon will be."""
        self._requests = requests
        self._is_placed = is_placed
        self._lengths = lengths
        self._max_num_seqs = max_num_seqs

    def choose(self, record: RequestRecord, replicas: Sequence[Replica]) -> Replica:
        """Which of ``replicas`` (at least one, all of which could run it) is expected to finish a request first."""
        if len(replicas) == 1:
            return replicas[0]
        adapter = record.adapter
        drawn = max(len(sequence.output_token_ids) for sequence in record.unfinished.values())
        work = Work(
            num_sequences=len(record.unfinished),
            prompt_tokens=len(record.prompt_token_ids) + drawn,
            output_tokens=max(self._lengths.expected(record) - drawn, 1.0),
            adapter=record.content_hash,
            rank_rows=adapter.num_rank_rows if adapter else 0,
            num_bytes=adapter.num_bytes if adapter else 0,
        )
        # One that has not reported costs is taken to be like the others: a guess would send it all or nothing.
        known = next((replica.costs for replica in replicas if replica.costs is not None), StepCosts())
        targets = [self._target(replica, known, work, record) for replica in replicas]
        best = choose(work, targets)
        return next(replica for replica in replicas if replica.replica_id == best)

    def _target(self, replica: Replica, costs: StepCosts, work: Work, record: RequestRecord) -> Target:
        model = replica.model
        here = set(replica.stats.resident_adapters)
        if self._is_placed(work.adapter, replica.replica_id):
            here.add(work.adapter)
        return Target(
            replica_id=replica.replica_id,
            costs=replica.costs or costs,
            backlog=self._requests.backlog(replica.replica_id),
            resident=here,
            on_host=replica.on_host,
            max_num_seqs=self._max_num_seqs,
            capacity_tokens=model.num_blocks * model.block_size if model else 1,
            cached_tokens=self._requests.prefixes.cached(record, replica),
        )
