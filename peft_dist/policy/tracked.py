"""What every policy shares: nobody is overtaken for longer than the bound, and ``ran`` follows ``choose``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence

import msgspec

from peft_dist.core.cost_model import CostModel
from peft_dist.policy.batching import Candidate, Choice, QueueState
from peft_dist.policy.overtaking import OvertakingTracker
from peft_dist.policy.queue_view import QueueView
from peft_dist.policy.settings import PolicySettings

_NOBODY: frozenset[str] = frozenset()


class Pending(msgspec.Struct, frozen=True):
    """A choice that was not yet reported as run, and how it was answered."""

    view: QueueView
    urgent: list[Candidate]
    choice: Choice
    answer: Choice


class TrackedPolicy(ABC):
    """Puts the bound on overtaking before whatever a policy usually does."""

    def __init__(self, cost: CostModel, settings: PolicySettings) -> None:
        self.cost = cost
        self.settings = settings
        self.overtaking = OvertakingTracker(settings.max_adapter_wait, settings.steps_in_flight)
        self._pending: Pending | None = None
        self._view: QueueView | None = None

    def choose(self, state: QueueState) -> Choice:
        view = self._view
        if view is None or not view.goes_on(state):
            view = self._view = QueueView(state, self.cost, self.settings.max_num_seqs)
        self.overtaking.advance(state.now)
        urgent: list[Candidate] = []
        if view.runnable:
            choice = self._usual(view)
            urgent = self.overtaking.urgent(view.runnable, self._seconds(view, choice))
            if not view.is_fair(choice.candidates, urgent):
                choice = self._rescue(view, urgent)
        else:
            choice = Choice(state.merged_adapter, [], "idle")
        mode, candidates = choice.merged_adapter, choice.candidates
        ids = frozenset(c.request_id for c in urgent) if urgent else _NOBODY
        answer = Choice(mode, candidates, choice.reason, ids, view.features(candidates, mode) if candidates else None)
        self._pending = Pending(view, urgent, choice, answer)
        return answer

    def ran(self, state: QueueState, choice: Choice, scheduled: Collection[str]) -> None:
        pending, self._pending = self._pending, None
        if pending is None or pending.answer is not choice or pending.view.state is not state:
            raise ValueError("ran() takes the state and the choice of the last choose(), once")
        ids = frozenset(scheduled)
        self._note_ran(pending, ids)
        if ids:
            self._account(pending, ids, 1)

    def _note_ran(self, pending: Pending, ids: frozenset[str]) -> None:
        view, candidates = pending.view, pending.choice.candidates
        # Where all ran who could, nobody was overtaken.
        all_ran = candidates is view.entitled and len(ids) == len(candidates)
        self.overtaking.ran(() if all_ran else view.entitled, pending.urgent, ids)

    def stable_steps(self, seconds: float) -> float:
        pending = self._pending
        # What is still learnt may change every prediction.
        if pending is None or not self.cost.fixed or pending.urgent:
            return 0.0
        view, choice = pending.view, pending.choice
        entitled, scheduled = view.entitled, _NOBODY
        if choice.candidates is entitled:
            entitled = []
        else:
            scheduled = frozenset(candidate.request_id for candidate in choice.candidates)
        bound = self.overtaking.stable_steps(entitled, scheduled, self._seconds(view, choice), seconds)
        return min(bound, self._stable_steps(pending)) if bound > 0 else 0.0

    def repeat(self, scheduled: Collection[str], starts: Sequence[float]) -> None:
        pending, self._pending = self._pending, None
        assert pending is not None and scheduled, "choose() comes first, and somebody ran"
        ids, count = frozenset(scheduled), len(starts)
        self._note_ran(pending, ids)
        self._account(pending, ids, count)
        if count > 1:
            self.overtaking.again(starts[1:])
            self._account_again(pending, count - 1)

    def forget(self, request_ids: Iterable[str]) -> None:
        self.overtaking.forget(request_ids)

    def forget_adapter(self, adapter: str) -> None:  # noqa: B027
        """Nothing is kept for an adapter here."""

    @property
    def merges(self) -> bool:
        return False

    @property
    def credits(self) -> dict[str, float]:
        return {}

    def report(self) -> dict[str, float]:
        return {"longest_overtaken_seconds": self.overtaking.longest_ever}

    @abstractmethod
    def _usual(self, view: QueueView) -> Choice:
        """The choice while nobody is urgent."""

    def _rescue(self, view: QueueView, urgent: Sequence[Candidate]) -> Choice:
        """A choice in which none of ``urgent`` is overtaken."""
        return Choice(None, view.fill([*urgent, *view.runnable], must=urgent), "urgent")

    def _account(self, pending: Pending, scheduled: frozenset[str], count: int) -> None:  # noqa: B027 (most have no books)
        """Book a step that was submitted; ``scheduled`` is not empty. Of ``count`` equal ones ``_account_again`` books
        the others, but for who was in them."""

    def _stable_steps(self, pending: Pending) -> float:
        """As ``stable_steps``, as far as ``_usual`` is concerned; here it depends on the queue alone."""
        return math.inf

    def _account_again(self, pending: Pending, count: int) -> None:  # noqa: B027
        """The same as so many more calls of ``choose`` and ``_account``, within what is stable."""

    def _seconds(self, view: QueueView, choice: Choice) -> float:
        """Predicted seconds of a choice, with the switch to it."""
        mode = choice.merged_adapter
        return view.switch(view.state.merged_adapter, mode) + view.seconds(choice.candidates, mode)
