"""A batch in the making, and who gives up KV blocks for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from peft_dist.core.batch import ScheduledSequence
from peft_dist.core.cost_model import StepFeatures
from peft_dist.core.request import Request, RequestStatus
from peft_dist.policy.batching import Candidate, Choice


@dataclass(slots=True)
class Draft:
    """
    Attributes:
        chosen: Whom the policy named.
        urgent: Ids of those of them who must not be overtaken any longer.
        settled: Ids of those that are in the batch, or lost their blocks while it was made.
        goes_on: Whether all that are in the batch were decoding before.
        may_start: Whether a request without blocks may still join; nobody smaller takes those that an older one lacks.
    """

    chosen: Sequence[Candidate]
    urgent: frozenset[str] = frozenset()
    sequences: list[ScheduledSequence] = field(default_factory=list)
    settled: set[str] = field(default_factory=set)
    goes_on: bool = True
    may_start: bool = True

    def foreseen(self, choice: Choice) -> StepFeatures | None:
        """What the policy says of its choice, if the batch has one token of each in it, unmerged; else None."""
        features = choice.features
        if features is None or features.merged or features.prefill_tokens or not self.goes_on:
            return None
        is_whole = len(self.sequences) == len(choice.candidates) == features.decode_sequences
        return features if is_whole else None

    def victim_to_grow(self, queue: dict[str, Request]) -> Request:
        """Who gives up blocks for the next tokens of a running request; perhaps that request itself.

        Args:
            queue: Unfinished requests, oldest first.
        """
        victim = _youngest(queue, self._spared()) or _youngest(queue, self.settled)
        assert victim is not None, "the request itself"
        return victim

    def victim_to_admit(self, queue: dict[str, Request], request: Request) -> Request | None:
        """Who gives up blocks for a request that has none; None when nobody must.

        Those who were passed over make room for their elders, or for anybody if nothing else could run.
        """
        victim = _youngest(queue, self._spared(), than=request if self.sequences else None)
        if victim is None and request.request_id in self.urgent:
            # Whoever must not be overtaken any longer takes the blocks of those who would overtake it.
            victim = _youngest(queue, self.settled, than=request)
        return victim

    def _spared(self) -> set[str]:
        return self.settled.union([candidate.request_id for candidate in self.chosen])


def _youngest(queue: dict[str, Request], spared: Collection[str], than: Request | None = None) -> Request | None:
    """The youngest running request that is not spared, younger than another one."""
    for request in reversed(queue.values()):
        if request is than:
            return None
        if request.status is RequestStatus.RUNNING and request.request_id not in spared:
            return request
    return None
