"""One adapter a step, merged (the paper's "merged only", and its baselines that know no LoRA kernel)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from peft_dist.core.cost_model import CostModel
from peft_dist.policy.batching import BASE, Candidate, Choice
from peft_dist.policy.queue_view import QueueView
from peft_dist.policy.settings import PolicySettings
from peft_dist.policy.tracked import TrackedPolicy


class MergePolicy(TrackedPolicy):
    """The adapter of the oldest request, with all its requests; the base counts as an adapter, and runs unmerged.

    With ``has_kernel``, an adapter that cannot be merged runs unmerged, in a first-come batch. Without it nothing but
    one adapter's requests can run (the engine must then refuse adapters that cannot be merged). ``prefix_only`` takes
    only the requests of the adapter that stand before the first one of another (the rule of the artifact's baselines).
    """

    def __init__(
        self, cost: CostModel, settings: PolicySettings, *, has_kernel: bool = True, prefix_only: bool = False
    ) -> None:
        super().__init__(cost, settings)
        self.has_kernel = has_kernel
        self.prefix_only = prefix_only

    def _usual(self, view: QueueView) -> Choice:
        adapter = view.runnable[0].adapter
        if not self._can_merge(view, adapter):
            return Choice(None, view.first_come, "not mergeable")
        members = view.alone(adapter)
        if self.prefix_only:
            members = list(takewhile(lambda c: c.adapter == adapter, view.runnable))[: view.seats]
        return self._only(adapter, members, "oldest")

    def _rescue(self, view: QueueView, urgent: Sequence[Candidate]) -> Choice:
        """The adapter of the oldest urgent request, up to where another adapter's urgent request would be overtaken."""
        adapter = urgent[0].adapter
        if not self._can_merge(view, adapter):
            return super()._rescue(view, urgent)
        others = (view.age[c.request_id] for c in urgent if c.adapter != adapter)
        barrier = min(others, default=len(view.runnable))
        members = [c for c in view.alone(adapter) if view.age[c.request_id] < barrier]
        return self._only(adapter, members, "urgent")

    def _can_merge(self, view: QueueView, adapter: str) -> bool:
        return adapter == BASE or not self.has_kernel or view.is_mergeable(adapter)

    def _only(self, adapter: str, members: list[Candidate], reason: str) -> Choice:
        return Choice(adapter or None, members, reason)
