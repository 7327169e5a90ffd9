"""What each adapter is owed for requests of its own that did not run because others did."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from peft_dist.policy.batching import Candidate


class CreditLedger:
    """Credits by adapter, around zero: dLoRA's (OSDI'24), less the constant that the artifact gives everybody at first.

    An adapter is privileged from ``gap`` on, and then for as long as it keeps the share ``hysteresis`` of it. Credits
    only move: their sum, with those that departed adapters left behind, is zero.
    """

    def __init__(self, gap: float, hysteresis: float, max_debt: float = math.inf) -> None:
        self.gap = gap
        self.max_debt = max_debt
        self.hysteresis = hysteresis
        self.left_behind = 0.0
        self._credits: dict[str, float] = {}
        self._privileged: frozenset[str] = frozenset()

    @property
    def credits(self) -> dict[str, float]:
        return dict(self._credits)

    def credit(self, adapter: str) -> float:
        return self._credits.get(adapter, 0.0)

    @property
    def total(self) -> float:
        """Zero, but for rounding."""
        return sum(self._credits.values()) + self.left_behind

    def know(self, adapters: Iterable[str]) -> None:
        """These adapters have requests."""
        credits = self._credits
        for adapter in adapters:
            if adapter not in credits:
                credits[adapter] = 0.0

    def move(self, payer: str, payee: str, amount: float) -> None:
        self._credits[payer] = self.credit(payer) - amount
        self._credits[payee] = self.credit(payee) + amount

    def privileged(self, adapters: Collection[str]) -> list[str]:
        """Those of ``adapters`` that go before others now, the highest credit first; equal ones in the order given."""
        if self.gap > 0 and not self._privileged and not any(self._credits.values()):
            return []
        gap, stay, credit = self.gap, self.gap * self.hysteresis, self._credits.get
        found = [
            adapter
            for adapter in adapters
            if (own := credit(adapter, 0.0)) >= gap or (own >= stay and adapter in self._privileged)
        ]
        return sorted(found, key=self.credit, reverse=True) if found else found

    @property
    def has_granted(self) -> bool:
        """Whether somebody ran as privileged in the last step."""
        return bool(self._privileged)

    def stable_steps(self, pairs: Sequence[tuple[str, str]], unit: float, known: Collection[str]) -> float:
        """How often ``unit`` may be moved from payer to payee for each of these pairs before anybody becomes privileged
        or may no longer be merged, where nobody is privileged now; ``known``: adapters that have requests."""
        if math.isfinite(self.max_debt) and not self._credits.keys() >= set(known):
            return 0.0  # With another one, everybody may owe more.
        if not pairs or not unit:
            return math.inf
        payees, payers = (Counter(pair[side] for pair in pairs) for side in (1, 0))
        least = min((self.gap - self.credit(payee)) / (unit * count) for payee, count in payees.items())
        if math.isfinite(self.max_debt):
            others = max(len(self._credits) - 1, 1)
            room = self.left_behind + self.max_debt * self.gap * others
            least = min(least, *((self.credit(payer) + room) / (unit * count) for payer, count in payers.items()))
        return max(least - 2.0, 0.0)

    def grant(self, adapters: Collection[str]) -> None:
        """These, and nobody else, ran as privileged."""
        if adapters or self._privileged:
            self._privileged = frozenset(adapters)

    @property
    def is_patient(self) -> bool:
        """Whether an adapter may be merged whatever it owes."""
        return self.max_debt == math.inf and self.gap > 0

    def may_merge(self, adapter: str) -> bool:
        """Whether an adapter does not owe the others more than ``max_debt`` gaps each."""
        if self.is_patient:
            return True
        others = len(self._credits) - (adapter in self._credits)
        return not others or self.credit(adapter) + self.left_behind >= -self.max_debt * self.gap * others

    def forget(self, adapter: str) -> None:
        """An adapter left; its credit or debt is nobody's."""
        self.left_behind += self._credits.pop(adapter, 0.0)
        self._privileged -= {adapter}


def displacements(ran: Sequence[Candidate], reference: Sequence[Candidate]) -> list[tuple[str, str]]:
    """(Payer, payee) for each request of ``reference`` that is not in ``ran``, both adapters.

    A displaced request's payer is the one that ran in its place: those that ran and are not in ``reference``, in order
    and, when there are fewer of them, in turn. Where there are none, all that ran pay in turn.
    """
    wanted = {candidate.request_id for candidate in reference}
    present = {candidate.request_id for candidate in ran}
    payers = [candidate for candidate in ran if candidate.request_id not in wanted] or list(ran)
    displaced = [candidate for candidate in reference if candidate.request_id not in present]
    return [(payers[i % len(payers)].adapter, candidate.adapter) for i, candidate in enumerate(displaced) if payers]
