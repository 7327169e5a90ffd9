"""Who pays whom for a step, in credits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peft_dist.policy.batching import Candidate
from peft_dist.policy.credit_ledger import CreditLedger, displacements
from peft_dist.policy.queue_view import QueueView
from peft_dist.policy.settings import PolicySettings


class Settlement:
    """Moves credits after each step. A displaced request is worth its share of the first-come batch, in seconds of the
    step; with ``displaced_credit`` set, the artifact's constants."""

    def __init__(self, ledger: CreditLedger, settings: PolicySettings) -> None:
        self.ledger = ledger
        self.settings = settings

    def alone(self, view: QueueView, ran: Sequence[Candidate], merged_adapter: str | None) -> None:
        """An adapter ran alone: it pays for those of the first-come batch that did not run."""
        self._pay(*self.price_of(view, ran, merged_adapter))

    def alone_again(self, view: QueueView, ran: Sequence[Candidate], merged_adapter: str | None, count: int) -> None:
        """As so many calls of ``alone``."""
        pairs, unit = self.price_of(view, ran, merged_adapter)
        if pairs:
            for _ in range(count):
                self._pay(pairs, unit)

    def price_of(
        self, view: QueueView, ran: Sequence[Candidate], merged_adapter: str | None
    ) -> tuple[list[tuple[str, str]], float]:
        """What ``alone`` moves: from whom to whom, and how much each time."""
        unit = self._unit(view, ran, merged_adapter)
        if self.settings.displaced_credit:
            # The artifact's rule: half for batches of unequal length.
            unit = self.settings.displaced_credit[0] / (1 if len(ran) == len(view.first_come) else 2)
        return displacements(ran, view.first_come), unit

    def interrupted(
        self,
        view: QueueView,
        ran: Sequence[Candidate],
        reference: Sequence[Candidate],
        favoured: frozenset[str],
        speed_ratio: float,
    ) -> None:
        """The requests ``favoured`` were put first, unmerged, where ``reference`` would have run in
        ``speed_ratio`` of the time.

        They pay for those of it that did not run, and for the speed that those who did run lost: else an adapter whose
        requests fit in beside all others, displacing nobody, would stay privileged, and nothing be merged again.
        """
        if self.settings.displaced_credit:
            self._pay(displacements(ran, view.first_come), self.settings.displaced_credit[1])
            return
        self._pay(displacements(ran, reference), self._unit(view, ran, None))
        present = {c.request_id for c in ran}
        payers = [c.adapter for c in ran if c.request_id in favoured]
        slowed = [c.adapter for c in reference if c.request_id in present and c.request_id not in favoured]
        if payers and slowed:
            price = view.seconds(ran, None) * interruption_price(len(slowed) / len(ran), speed_ratio) / len(slowed)
            price *= crowd(view)
            self._pay([(payers[i % len(payers)], payee) for i, payee in enumerate(slowed)], price)

    def _pay(self, pairs: Sequence[tuple[str, str]], unit: float) -> None:
        for payer, payee in pairs:
            self.ledger.move(payer, payee, unit)

    def _unit(self, view: QueueView, ran: Sequence[Candidate], merged_adapter: str | None) -> float:
        return view.seconds(ran, merged_adapter) / max(1, len(view.first_come))


def crowd(view: QueueView) -> float:
    """Requests that wait for a step, as a multiple of those that have a seat: an interruption keeps them all."""
    return len(view.runnable) / max(1, len(view.first_come))


def interruption_price(share: float, speed_ratio: float) -> float:
    """Credits a second for which those put first slow down the ``share`` of the batch that could have run merged.

    While seats are free, merging for a part f of the time costs the share h of the hot adapter 1 / (1 + g f) seconds a
    token, g = 1 / speed_ratio - 1, and everybody else 1 / (1 - f). Their mean is least at f = (1 - q) / (1 + g q) with
    q = sqrt((1 - h) / (g h)), or at 0 if q > 1. The others earn 1 - h a merged second, so that income and expense meet
    at this f if an unmerged second costs (1 - h) f / (1 - f) = (1 - h) speed_ratio (1 / q - 1).
    """
    gain = 1.0 / speed_ratio - 1.0
    if gain <= 0 or share >= 1:
        return 0.0
    return (1 - share) * speed_ratio * max(0.0, math.sqrt(gain * share / (1 - share)) - 1.0)
