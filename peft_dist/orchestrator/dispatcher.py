"""Who takes a request, in terms of the orchestrator's tables."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence

from peft_dist.core.step_costs import StepCosts
from peft_dist.orchestrator.records import Replica, RequestRecord
from peft_dist.orchestrator.requests import RequestTable
from peft_dist.policy.dispatch import Backlog, Target, Work, choose

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
        self, requests: RequestTable, lengths: Lengths, max_num_seqs: int, placed: Callable[[str], Container[int]]
    ) -> None:
        """``placed``: Replicas on which a content is to be at hand, and so is, or soon will be."""
        self._requests = requests
        self._placed = placed
        self._lengths = lengths
        self._max_num_seqs = max_num_seqs

    def choose(
        self, record: RequestRecord, replicas: Sequence[Replica], forecasts: Mapping[int, Backlog] | None = None
    ) -> Replica:
        """Which of ``replicas`` (at least one, all of which could run it) is expected to finish a request first.

        ``forecasts``: Backlogs to go by in place of those there are, by replica.
        """
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
        targets = self._targets(replicas, known, work, record, forecasts or {})
        best = choose(work, targets)
        return next(replica for replica in replicas if replica.replica_id == best)

    def _targets(
        self,
        replicas: Sequence[Replica],
        costs: StepCosts,
        work: Work,
        record: RequestRecord,
        forecasts: Mapping[int, Backlog],
    ) -> list[Target]:
        placed, here = self._placed(work.adapter), frozenset((work.adapter,))
        backlogs, most = self._requests.backlogs(replicas), self._max_num_seqs
        prefixes = self._requests.prefixes
        if forecasts:
            backlogs = [forecasts.get(one.replica_id, own) for one, own in zip(replicas, backlogs, strict=True)]
        cached = [0] * len(replicas)
        if not prefixes.is_empty:
            cached = [prefixes.cached(record, replica) for replica in replicas]
        return [
            Target(
                replica_id := replica.replica_id,
                replica.costs or costs,
                backlog,
                here if replica_id in placed else replica.resident,
                most,
                replica.capacity_tokens,
                replica.on_host,
                known,
                replica.pause,
            )
            for replica, backlog, known in zip(replicas, backlogs, cached, strict=True)
        ]
