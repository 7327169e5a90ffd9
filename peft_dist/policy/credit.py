"""dLoRA's dynamic batching (OSDI'24): merged or unmerged by thresholds, fair by credits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import msgspec

from peft_dist.core.cost_model import CostModel, StepFeatures
from peft_dist.policy.batching import BASE, Choice
from peft_dist.policy.corrections import with_corrections
from peft_dist.policy.credit_ledger import CreditLedger
from peft_dist.policy.horizon import LeadSteps, RequestSteps
from peft_dist.policy.queue_view import QueueView
from peft_dist.policy.settings import PolicySettings
from peft_dist.policy.settlement import Settlement, crowd
from peft_dist.policy.thresholds import ThresholdTuner
from peft_dist.policy.tracked import Pending, TrackedPolicy

# Share of the newest step in the running mean of what merging saves.
SAVING_RATE = 0.05
# What differs by less may turn out either way by rounding.
CERTAIN = 1.0 - 1e-9
# Speed ratios that are remembered.
MAX_RATIOS = 1 << 14


class Ordinary(msgspec.Struct, frozen=True):
    """What would run if nobody were privileged or urgent.

    Attributes:
        choice: The step.
        alone: The adapter that it runs alone or around, "" the base; None for a first-come batch.
        leader: The adapter that would be merged: with the most requests.
        speed_ratio: Predicted merged over unmerged seconds of the first-come batch.
        seconds: The latter.
    """

    choice: Choice
    alone: str | None
    leader: str | None
    speed_ratio: float
    seconds: float

    @property
    def merging(self) -> str | None:
        """The adapter that runs alone, or would if this step were merged."""
        return self.alone if self.alone is not None else self.leader


class CreditPolicy(TrackedPolicy):
    """Merges an adapter with enough requests, compared with the first-come batch; lets adapters that this displaced too
    often go first, unmerged.

    The base takes part as an adapter that needs no merge: a batch of its requests alone runs free of LoRA.
    """

    def __init__(self, cost: CostModel, settings: PolicySettings) -> None:
        super().__init__(cost, settings)
        self.ledger = CreditLedger(settings.credit_gap, settings.credit_hysteresis, settings.max_debt)
        self.settlement = Settlement(self.ledger, settings)
        self.tuner = ThresholdTuner(settings)
        self.steps = RequestSteps(settings.expected_steps)
        self.leads = LeadSteps(settings.expected_lead)
        self._alone: str | None = None
        self._leader: str | None = None
        self._mean_saving: float | None = None
        self._ordinary: Ordinary | None = None
        # What that was made of, and the gap that came of it.
        self._decided: tuple[QueueView, float] | None = None
        self._kept_gap: float | None = None
        # Whose adapters have credits, if none has left since.
        self._known: QueueView | None = None
        # Of predictions that do not change: by decodes, prompt tokens and unmerged seconds.
        self._ratios: dict[tuple[int, int, float], float] = {}
        self._privileged: list[str] = []
        # Whether the next decision knows another gap than the last one did.
        self._is_gap_new = False

    @property
    def merges(self) -> bool:
        # Beside a merged adapter whose batches others join it matters little who is there.
        return self.settings.amortise and not self.settings.merged_minority

    @property
    def credits(self) -> dict[str, float]:
        return self.ledger.credits

    def forget(self, request_ids: Iterable[str]) -> None:
        ids = list(request_ids)
        super().forget(ids)
        self.steps.ended(ids)

    def forget_adapter(self, adapter: str) -> None:
        self.ledger.forget(adapter)
        self._known = None

    def report(self) -> dict[str, float]:
        ratio = self._ordinary.speed_ratio if self._ordinary else 1.0
        return {
            **super().report(),
            "alpha": self.tuner.alpha,
            "beta": self.tuner.beta(ratio),
            "speed_ratio": ratio,
            "credit_gap": self.ledger.gap,
            "expected_steps": self.steps.mean,
            **({"expected_lead": self.leads.mean} if math.isfinite(self.leads.mean) else {}),
        }

    def _usual(self, view: QueueView) -> Choice:
        ordinary = self._ordinary
        if ordinary is None or not self._is_again(view, ordinary):
            self._ordinary = ordinary = self._decide(view)
            self._decided = view, self.tuner.alpha
            self._kept_gap = None
        gap = self._kept_gap
        if gap is None:
            gap = self._kept_gap = self._gap(view, ordinary)
        self._is_gap_new, self.ledger.gap = gap != self.ledger.gap, gap
        self._privileged = self.ledger.privileged(view.groups)
        if not self._privileged:
            return ordinary.choice
        front = [c for adapter in self._privileged for c in view.groups[adapter]]
        members = {c.request_id for c in ordinary.choice.candidates}
        if all(c.request_id in members for c in front[: view.seats]):
            return ordinary.choice
        return Choice(None, view.fill([*front, *view.runnable]), "privileged")

    def _is_again(self, view: QueueView, ordinary: Ordinary) -> bool:
        """Whether ``_decide`` would answer the same as the last time: the same requests come first, nothing is merged
        or is to be, whatever that would save, and who may be merged depends on nothing that changes."""
        if self._decided != (view, self.tuner.alpha) or not self.cost.fixed or self.settings.merged_minority:
            return False
        if ordinary.alone is not None or self._alone is not None or view.state.merged_adapter is not None:
            return False
        leader = ordinary.leader
        is_small = leader is None or len(view.groups[leader]) < self._least_to_enter(view)
        return is_small and self.ledger.is_patient

    def _decide(self, view: QueueView) -> Ordinary:
        seconds = view.seconds(view.first_come, None)
        ratio = self._speed_ratio(view, seconds)
        saving = self._saving(seconds, ratio)
        current = self._current(view)
        may_stay = current in view.groups and self._is_eligible(view, current)
        leader = self._find_leader(view)
        alone, reason = self._target(view, current if may_stay else None, leader, ratio, saving)
        choice = Choice(alone or None, view.first_come if alone is None else view.alone(alone), reason)
        if self.settings.merged_minority:
            corrected = with_corrections(view, choice, leader, self._horizon(view, leader))
            alone, choice = (alone if corrected is choice else corrected.merged_adapter), corrected
        return Ordinary(choice, alone, leader, ratio, seconds)

    def _is_eligible(self, view: QueueView, adapter: str) -> bool:
        """Whether it may be merged, or needs no merge."""
        return (adapter == BASE or view.is_mergeable(adapter)) and self.ledger.may_merge(adapter)

    def _find_leader(self, view: QueueView) -> str | None:
        """The eligible adapter with the most requests; of several the one with the oldest."""
        leader, most = None, 0
        mergeable, may_merge = view.state.mergeable, self.ledger.may_merge
        for adapter, waiting in view.groups.items():
            # As ``_is_eligible``, written out.
            if len(waiting) > most and (adapter == BASE or mergeable(adapter)) and may_merge(adapter):
                leader, most = adapter, len(waiting)
        return leader

    def _target(
        self, view: QueueView, current: str | None, leader: str | None, ratio: float, saving: float
    ) -> tuple[str | None, str]:
        """The adapter to run alone, None for a first-come batch; and why."""
        batch = len(view.first_come)
        enough = current is not None and len(view.groups[current]) >= self.tuner.beta(ratio) * batch
        if current is not None and enough and not self._loses(view, current, saving):
            return current, "stay"
        is_large = leader is not None and len(view.groups[leader]) >= self._least_to_enter(view)
        if leader is not None and is_large and self._pays(view, leader, saving):
            return leader, "enter"
        return None, "first come"

    def _least_to_enter(self, view: QueueView) -> float:
        """Requests of an adapter from which on it may be merged."""
        batch = len(view.first_come)
        # While everybody has a seat, whoever is displaced would have cost the others nothing.
        return max(self.tuner.alpha, self.settings.seated_alpha if batch == len(view.runnable) else 0.0) * batch

    def _current(self, view: QueueView) -> str | None:
        """The adapter of the period that lasts, unless somebody else changed the weights meanwhile."""
        merged = view.state.merged_adapter
        return self._alone if (self._alone or None) == merged else merged

    def _speed_ratio(self, view: QueueView, seconds: float) -> float:
        """Of the same rows in both modes: comparing batches would count prompts that one of them puts off as saved."""
        features = view.features(view.first_come, None)
        key = features.decode_sequences, features.prefill_tokens, seconds
        if (ratio := self._ratios.get(key)) is None:
            merged = StepFeatures(True, features.decode_sequences, features.prefill_tokens)
            ratio = self.cost.step_seconds(merged) / max(seconds, 1e-9)
            if self.cost.fixed:
                if len(self._ratios) >= MAX_RATIOS:
                    self._ratios.clear()
                self._ratios[key] = ratio
        return ratio

    def _pays(self, view: QueueView, leader: str, saving: float) -> bool:
        """Whether merging saves more than the switches to it and back take, over the steps that it may last."""
        if not self.settings.amortise:
            return True
        target = leader or None
        switches = view.switch(view.state.merged_adapter, target) + view.switch(target, None)
        return saving * self._horizon(view, leader) > switches

    def _loses(self, view: QueueView, current: str, saving: float) -> bool:
        """Whether staying merged costs more than unmerging does."""
        return self.settings.amortise and -saving * self._horizon(view, current) > view.switch(current or None, None)

    def _saving(self, seconds: float, ratio: float) -> float:
        """Seconds that merging saves a step, on average over the last steps: one with a long prompt, where the ratio is
        another, says little about those to come."""
        now = (1.0 - ratio) * seconds
        return now if self._mean_saving is None else self._mean_saving + SAVING_RATE * (now - self._mean_saving)

    def _horizon(self, view: QueueView, leader: str | None) -> float:
        """Steps for which the leader is expected to lead: as long as its requests keep the seats, unless others have
        ended leads sooner."""
        return min(self._longest(view, leader), self.leads.expected(leader))

    def _gap(self, view: QueueView, ordinary: Ordinary) -> float:
        """Credits are in seconds, and so is the gap: it grows with what an interruption of a merged period costs."""
        if self.settings.displaced_credit:
            return self.settings.credit_gap
        target = ordinary.alone or ordinary.leader or None
        interruption = view.switch(target, None) + ordinary.seconds + view.switch(None, target)
        return self.settings.credit_gap * interruption * crowd(view)

    def _account(self, pending: Pending, scheduled: frozenset[str], count: int) -> None:
        view, choice, ordinary = pending.view, pending.choice, self._ordinary
        assert ordinary is not None, "choose() sets it"
        self.steps.ran(scheduled, count)
        self._mean_saving = self._saving(ordinary.seconds, ordinary.speed_ratio)
        self.leads.ran(self._paying_leader(view, ordinary, choice))
        if view is not self._known:
            self.ledger.know(view.groups)
            self._known = view
        is_ordinary = choice is ordinary.choice
        self._change(view, ordinary, ordinary.alone if is_ordinary else None)
        if not is_ordinary:
            ran = [c for c in choice.candidates if c.request_id in scheduled]
            favoured = [*pending.urgent, *(c for a in self._privileged for c in view.groups[a])]
            # Only merging makes debts: the bound alone must not, or this would not be first come, first served where
            # merging cannot pay.
            if ordinary.alone is not None or choice.reason == "privileged":
                ratio = ordinary.speed_ratio if ordinary.alone is not None else 1.0
                ids = frozenset(c.request_id for c in favoured)
                self.settlement.interrupted(view, ran, ordinary.choice.candidates, ids, ratio)
        else:
            self._count(view, ordinary)
            if ordinary.alone is not None:
                ran = [c for c in choice.candidates if c.request_id in scheduled]
                self.settlement.alone(view, ran, choice.merged_adapter)
        self.ledger.grant(self._privileged if choice.reason == "privileged" else ())
        self._leader = ordinary.leader

    def _stable_steps(self, pending: Pending) -> float:
        """Within a period, while nobody is privileged: until credits, or what merging is expected to save, may change
        the decision. What depends on more than that is not looked into."""
        view, ordinary = pending.view, self._ordinary
        is_usual = ordinary is not None and pending.choice is ordinary.choice and ordinary.alone == self._alone
        if ordinary is None or not is_usual or self._privileged or self.ledger.has_granted:
            return 0.0
        if self.settings.merged_minority or ordinary.choice.reason == "enter":
            return 0.0
        if self._is_gap_new and math.isfinite(self.settings.max_debt):
            return 0.0
        if ordinary.alone is None:
            return min(self._steps_unmerged(view, ordinary), self.ledger.stable_steps([], 0.0, view.groups))
        pairs, unit = self.settlement.price_of(view, ordinary.choice.candidates, ordinary.choice.merged_adapter)
        return min(self._steps_merged(view, ordinary), self.ledger.stable_steps(pairs, unit, view.groups))

    def _steps_unmerged(self, view: QueueView, ordinary: Ordinary) -> float:
        """After how many steps merging the leader may pay, where it does not."""
        leader = ordinary.leader
        if leader is None or len(view.groups[leader]) < self._least_to_enter(view):
            return math.inf
        saving = self._extreme_saving(ordinary, max)
        switches = view.switch(view.state.merged_adapter, leader or None) + view.switch(leader or None, None)
        return math.inf if saving * self._longest(view, leader) < switches * CERTAIN else 0.0

    def _steps_merged(self, view: QueueView, ordinary: Ordinary) -> float:
        """After how many steps staying merged may cost more than unmerging."""
        loss = -self._extreme_saving(ordinary, min)
        if not self.settings.amortise or loss <= 0.0:
            return math.inf
        switch = view.switch(ordinary.alone or None, None)
        return math.inf if loss * self._longest(view, ordinary.alone) < switch * CERTAIN else 0.0

    def _extreme_saving(self, ordinary: Ordinary, extreme: Callable[[float, float], float]) -> float:
        """The running mean goes from where it is towards what this step saves, and no further."""
        now = (1.0 - ordinary.speed_ratio) * ordinary.seconds
        return now if self._mean_saving is None else extreme(now, self._mean_saving)

    def _longest(self, view: QueueView, leader: str | None) -> float:
        """What ``_horizon`` never exceeds while the requests run on: its part that falls."""
        waiting = view.groups[leader] if leader is not None else []
        left = self.steps.left([candidate.request_id for candidate in waiting])
        return left * max(1.0, len(waiting) / view.seats)

    def _account_again(self, pending: Pending, count: int) -> None:
        view, choice, ordinary = pending.view, pending.choice, self._ordinary
        assert ordinary is not None, "choose() sets it"
        now = (1.0 - ordinary.speed_ratio) * ordinary.seconds
        mean = now if self._mean_saving is None else self._mean_saving
        for _ in range(count):
            if mean == now:
                break
            mean += SAVING_RATE * (now - mean)
        self._mean_saving = mean
        self.leads.ran(self._paying_leader(view, ordinary, choice), count)
        self.tuner.record_again(*self._both_modes(view, ordinary), count)
        if ordinary.alone is not None:
            self.settlement.alone_again(view, choice.candidates, choice.merged_adapter, count)

    def _paying_leader(self, view: QueueView, ordinary: Ordinary, choice: Choice) -> str | None:
        """The adapter that runs merged, or would, if its requests are worth the others' waiting."""
        leader = ordinary.merging
        if leader is None or choice is not ordinary.choice:
            return None
        return leader if len(view.groups[leader]) >= ordinary.speed_ratio * len(view.first_come) else None

    def _change(self, view: QueueView, ordinary: Ordinary, alone: str | None) -> None:
        """Tune the thresholds if this step begins a new period."""
        if alone != self._alone:
            switch = view.switch(self._alone or None, alone or None)
            self.tuner.end_period(self._alone is not None, switch, ordinary.speed_ratio)
        self._alone = alone

    def _count(self, view: QueueView, ordinary: Ordinary) -> None:
        """What each mode would have done in this step."""
        self.tuner.record(*self._both_modes(view, ordinary))
        if ordinary.alone is None and ordinary.leader != self._leader:
            self.tuner.virtual_switch(view.switch(None, ordinary.leader or None))

    def _both_modes(self, view: QueueView, ordinary: Ordinary) -> tuple[int, int, float, float]:
        """Requests that the merged and the first-come batch of this step have, and the seconds that they take."""
        merging = ordinary.merging
        seconds = ordinary.seconds
        requests = min(len(view.groups[merging]), view.seats) if merging is not None else 0
        return requests, len(view.first_come), seconds * ordinary.speed_ratio, seconds
