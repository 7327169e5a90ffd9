"""A queue arranged for decisions: by age, by adapter, and cut to what one step can hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

from peft_dist.core.cost_model import CostModel, StepFeatures
from peft_dist.policy.batching import BASE, Candidate, QueueState

# Batches that a view remembers: it may last for many steps, and a batch may be made anew in each.
MAX_KNOWN = 64


class QueueView:
    """What of a queue can run now, with at most ``seats`` requests a step."""

    def __init__(self, state: QueueState, cost: CostModel, max_num_seqs: int | None = None) -> None:
        self.state = state
        self.cost = cost
        self.seats = min(state.max_num_seqs, max_num_seqs or state.max_num_seqs)
        self._features: dict[tuple[int, str | None], tuple[Sequence[Candidate], StepFeatures]] = {}
        # Of the same batches, where predictions do not change.
        self._seconds: dict[tuple[int, str | None], float] = {}
        self._is_fixed = cost.fixed
        self._alone: dict[str, list[Candidate]] = {}
        self.runnable: list[Candidate] = []
        self.groups: dict[str, list[Candidate]] = {}
        """Runnable requests by adapter, oldest first; adapters by the age of their oldest request."""
        runnable, groups = self.runnable, self.groups
        for candidate in state.candidates:
            if candidate.num_new_tokens > 0 and candidate.is_resident:
                runnable.append(candidate)
                group = groups.get(candidate.adapter)
                if group is None:
                    groups[candidate.adapter] = [candidate]
                else:
                    group.append(candidate)
        is_whole = len(runnable) <= self.seats and len(groups) - (BASE in groups) <= state.max_loras
        self.first_come = runnable if is_whole else self.fill(runnable)
        """The batch of plain first come, first served."""
        self.entitled = runnable if len(runnable) == len(state.candidates) else self._entitled()
        """Who could run if only its elders were there, oldest first: also those whose adapter is not on the device, if
        it is among the first that fit."""

    def goes_on(self, state: QueueState) -> bool:
        """Whether it is right for another state too, but for time and merged adapter; then it is of that one now."""
        before = self.state
        if state.candidates is not before.candidates or state.max_num_seqs != before.max_num_seqs:
            return False
        if state.max_loras != before.max_loras or state.max_num_batched_tokens != before.max_num_batched_tokens:
            return False
        if state.mergeable is not before.mergeable or state.holds_merged is not before.holds_merged:
            return False
        self.state = state
        return True

    def _entitled(self) -> list[Candidate]:
        adapters, found = {BASE}, []
        for candidate in self.state.candidates:
            if not candidate.num_new_tokens:
                continue
            if len(adapters) <= self.state.max_loras:
                adapters.add(candidate.adapter)
            if candidate.is_resident or candidate.adapter in adapters:
                found.append(candidate)
        return found

    @cached_property
    def age(self) -> dict[str, int]:
        """Position of each runnable request, the oldest at 0."""
        return {candidate.request_id: index for index, candidate in enumerate(self.runnable)}

    @cached_property
    def prefix(self) -> list[Candidate]:
        """The same without passing anyone over: it ends at the first request whose adapter does not fit in."""
        return self.fill(self.runnable, must=self.runnable)

    def fill(
        self, order: Iterable[Candidate], must: Sequence[Candidate] = (), merged_adapter: str | None = None
    ) -> list[Candidate]:
        """A batch from ``order``: no request twice, no more than the seats and the adapters of one step.

        Nobody younger is taken than one of ``must`` that was passed over because its adapter did not fit in.
        """
        chosen: dict[str, Candidate] = {}
        protected = {candidate.request_id for candidate in must}
        free = {BASE, merged_adapter}
        adapters: set[str] = set()
        # While an adapter is merged, others are corrected with its rows too.
        room = self.state.max_loras - (merged_adapter is not None)
        barrier = len(self.runnable)
        for candidate in order:
            if len(chosen) == self.seats:
                break
            if self.age[candidate.request_id] > barrier:
                continue
            if candidate.adapter not in free and candidate.adapter not in adapters:
                if len(adapters) == max(room, 0):
                    if candidate.request_id in protected:
                        barrier = self.age[candidate.request_id]
                    continue
                adapters.add(candidate.adapter)
            chosen[candidate.request_id] = candidate
        return [c for c in chosen.values() if self.age[c.request_id] <= barrier]

    def oldest_first(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        return sorted(candidates, key=lambda candidate: self.age[candidate.request_id])

    def alone(self, adapter: str) -> list[Candidate]:
        """The batch of one adapter; the same object each time."""
        batch = self._alone.get(adapter)
        if batch is None:
            batch = self._alone[adapter] = self.groups[adapter][: self.seats]
        return batch

    def joined(self, adapter: str) -> list[Candidate]:
        """The batch of one adapter, merged, with the seats it leaves given to the oldest others."""
        order = self.groups[adapter] + self.runnable
        if self.state.max_loras < 1:
            return self.alone(adapter)
        return self.oldest_first(self.fill(order, merged_adapter=adapter))

    def is_fair(self, batch: Sequence[Candidate], protected: Sequence[Candidate]) -> bool:
        """Whether no step that takes ``batch`` in order, as far as it fits, overtakes one of ``protected``."""
        if not protected:
            return True
        ages = [self.age[candidate.request_id] for candidate in batch]
        inside = {candidate.request_id for candidate in batch}
        youngest = max(ages, default=-1)
        return ages == sorted(ages) and all(
            candidate.request_id in inside or self.age[candidate.request_id] > youngest for candidate in protected
        )

    def is_mergeable(self, adapter: str) -> bool:
        return adapter != BASE and self.state.mergeable(adapter)

    def can_host(self, adapter: str) -> bool:
        """Whether others may join its merged batches."""
        return self.is_mergeable(adapter) and self.state.can_host(adapter)

    def rank(self, adapter: str | None) -> int:
        return self.groups[adapter][0].rank if adapter in self.groups else 0

    def features(self, batch: Sequence[Candidate], merged_adapter: str | None) -> StepFeatures:
        """Of ``batch``, cut to the tokens of one step."""
        key = id(batch), merged_adapter
        known = self._features.get(key)
        if known is None:
            if len(self._features) >= MAX_KNOWN:
                self._features.clear()
                self._seconds.clear()
            # With the batch itself, or another one might come to be where it was.
            known = self._features[key] = batch, self._count(batch, merged_adapter)
        return known[1]

    def _count(self, batch: Sequence[Candidate], merged_adapter: str | None) -> StepFeatures:
        tokens, num_decodes, num_prefill = self.state.max_num_batched_tokens, 0, 0
        rows = []
        num_lora = num_products = 0
        ranks: dict[str, int] = {}
        for candidate in batch:
            num_new = candidate.num_new_tokens
            if num_new > tokens:
                num_new = tokens
            if not num_new:
                break
            tokens -= num_new
            adapter = candidate.adapter
            if merged_adapter is not None:
                rows.append((adapter, num_new, candidate.rank))
                continue
            # Written out, for what is asked in every step.
            if num_new == 1:
                num_decodes += 1
            else:
                num_prefill += num_new
            if adapter:
                rank = candidate.rank
                num_lora += num_new
                num_products += num_new * rank
                ranks[adapter] = rank
        if merged_adapter is not None:
            return StepFeatures.of(rows, merged_adapter, self.rank(merged_adapter))
        num_rows = sum(ranks.values())
        return StepFeatures(False, num_decodes, num_prefill, num_lora, len(ranks), num_rows, num_products)

    def seconds(self, batch: Sequence[Candidate], merged_adapter: str | None) -> float:
        """Predicted seconds of a step."""
        if not self._is_fixed:
            return self.cost.step_seconds(self.features(batch, merged_adapter))
        key = id(batch), merged_adapter
        known = self._seconds.get(key)
        if known is None:
            known = self._seconds[key] = self.cost.step_seconds(self.features(batch, merged_adapter))
        return known

    def switch(self, current: str | None, target: str | None) -> float:
        """Predicted seconds of a switch; what is held already costs nothing."""
        if current == target or (target is not None and self.state.holds_merged(target)):
            return 0.0
        return self.cost.switch_seconds(current, target, self.rank(target))
