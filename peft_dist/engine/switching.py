"""Changes of what the weights hold, and what they are seen to take."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.cost_model import CostModel, SwitchKind
from peft_dist.engine.executor import Executor

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Switch:
    """One change.

    Attributes:
        seconds: What it took; None where the device tells with the next batch.
        was_held: The merged weights were still there, so that its seconds say nothing of other changes.
    """

    kind: SwitchKind
    rank_rows: int
    seconds: float | None
    was_held: bool


class Switcher:
    """Has the weights hold what a batch needs; the cost model learns from every change that took work.

    Attributes:
        num_switches: How many there have been.
        seconds: What those took of which it is known.
    """

    def __init__(self, executor: Executor, cost: CostModel) -> None:
        self.num_switches = 0
        self.seconds = 0.0
        self._executor = executor
        self._cost = cost
        self._unmergeable: set[str] = set()

    def can_merge(self, spec: AdapterSpec) -> bool:
        return spec.content_hash not in self._unmergeable and self._executor.can_merge(spec)

    def can_host(self, spec: AdapterSpec) -> bool:
        """Whether requests of others may join its merged batches."""
        return self.can_merge(spec) and self._executor.can_host(spec)

    def switch(self, spec: AdapterSpec | None) -> Switch | None:
        """Merge an adapter, or bring the base back; None when the merge failed.

        A merge that fails costs nobody an answer: the weights are the base's, and the adapter is never merged again,
        whatever the policy asks for: a baseline that only merges then has it run unmerged too.
        """
        if spec is not None and spec.content_hash in self._unmergeable:
            return None
        was_held = spec is not None and self._executor.holds_merged(spec.content_hash)
        try:
            seconds = self._executor.switch(spec)
        except Exception as error:
            if spec is None:
                raise
            logger.exception("adapter %r could not be merged (%s): it runs unmerged from now on", spec.name, error)
            self._unmergeable.add(spec.content_hash)
            self._executor.switch(None)
            return None
        self.num_switches += 1
        switch = Switch("merge" if spec else "unmerge", spec.num_rank_rows if spec else 0, seconds, was_held)
        if seconds is not None:
            self.took(switch, seconds)
        return switch

    def took(self, switch: Switch, seconds: float) -> None:
        """Learn what a change took on the device."""
        self.seconds += seconds
        if not switch.was_held:
            self._cost.observe_switch(switch.kind, seconds, switch.rank_rows)
