"""First come, first served, always unmerged (the paper's "unmerged only")."""

from __future__ import annotations

from peft_dist.policy.batching import Choice
from peft_dist.policy.queue_view import QueueView
from peft_dist.policy.tracked import TrackedPolicy


class FirstComePolicy(TrackedPolicy):
    """The oldest requests of as many adapters as a step holds; with ``strict_prefix`` nobody else is passed over."""

    def _usual(self, view: QueueView) -> Choice:
        return Choice(None, view.prefix if self.settings.strict_prefix else view.first_come, "first come")
