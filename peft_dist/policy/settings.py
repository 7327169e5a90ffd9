"""Settings of the batching policies."""

from __future__ import annotations

import math
from dataclasses import dataclass

from peft_dist.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """Defaults are ours; ``artifact()`` are the constants of dLoRA's artifact (OSDI'24).

    Attributes:
        max_adapter_wait: Seconds that a request may be overtaken by younger ones; infinite for no bound.
        steps_in_flight: Steps that are submitted before the results of the last one are known.
        merged_minority: Let others join a merged batch, with their rows corrected by the LoRA kernel.
        aimd_add: Step by which a threshold that proved right moves towards the other one.
        aimd_mul: Factor by which a threshold that proved wrong moves away from the other one.
        alpha: Requests of an adapter, in first-come batches, from which it is merged; the starting value.
        max_alpha: Upper end of ``alpha``'s range.
        seated_alpha: Lower end of it while every request has a seat.
        beta: The same for staying merged; None starts from the predicted ratio of merged to unmerged seconds.
        credit_gap: Credit at which an adapter becomes privileged, in interruptions of a merged period (two switches and
            an unmerged step, 67 ms with the paper's times). One request displaced for a second earns a second, divided
            by the requests of the first-come batch. With ``displaced_credit``, in units of that.
        credit_hysteresis: Share of the gap above which a privileged adapter stays privileged.
        max_debt: Gaps for each other adapter that an adapter may owe and still be merged. Privilege alone bounds debts;
            with this bound at 1, as the artifact has it, an adapter that reached it may never be merged again, because
            those whom it owes to are served without it and pay nothing back.
        displaced_credit: What one displaced request moves in a step of (a merged, a privileged) batch, instead of its
            share of the step's predicted seconds.
        expected_steps: Steps that a request is expected to run, until requests have ended and told.
        expected_lead: Steps on end for which an adapter is expected to have enough requests to be merged, until some
            such leads have ended. Few: a first lead that is longer is expected to last as long again as it already has,
            so that merging begins when it would have paid by then.
        amortise: Merge only if the predicted saving over these steps pays for the switches.
        max_num_seqs: Further limit of seats.
        strict_prefix: Batches of the baselines end at the first request that does not fit in (the artifact's rule).
        paper_times: Use the paper's times and not the cost model.
    """

    max_adapter_wait: float = 5.0
    steps_in_flight: int = 0
    merged_minority: bool = False
    aimd_add: float = 0.05
    aimd_mul: float = 1.1
    alpha: float = 1.0
    max_alpha: float = 1.0
    seated_alpha: float = 1.0
    beta: float | None = None
    credit_gap: float = 1.5
    credit_hysteresis: float = 0.5
    max_debt: float = math.inf
    displaced_credit: tuple[float, float] | None = None
    expected_steps: float = 64.0
    expected_lead: float = 8.0
    amortise: bool = True
    max_num_seqs: int | None = None
    strict_prefix: bool = False
    paper_times: bool = False

    def __post_init__(self) -> None:
        self._require("max_adapter_wait", self.max_adapter_wait >= 0, "at least 0 seconds")
        self._require("steps_in_flight", self.steps_in_flight >= 0, "at least 0")
        self._require("aimd_add", self.aimd_add > 0, "above 0")
        self._require("aimd_mul", self.aimd_mul > 1, "above 1")
        self._require("alpha", 0 < self.alpha <= self.max_alpha, "above 0 and at most max_alpha")
        self._require("beta", self.beta is None or 0 < self.beta <= self.alpha, "above 0 and at most alpha, or None")
        self._require("credit_gap", self.credit_gap > 0, "above 0")
        self._require("credit_hysteresis", 0 <= self.credit_hysteresis <= 1, "between 0 and 1")
        self._require("expected_steps", self.expected_steps >= 1, "at least 1")
        self._require("expected_lead", self.expected_lead >= 0, "at least 0")
        self._require("max_num_seqs", self.max_num_seqs is None or self.max_num_seqs >= 1, "at least 1, or None")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"{name}={getattr(self, name)} must be {rule}")

    @classmethod
    def artifact(cls) -> PolicySettings:
        """The artifact's constants: 16 seats, Llama-2-7B's times, a credit gap that takes minutes to fire, no bound."""
        seats = 16
        speed = 15e-3 / 27e-3
        return cls(
            max_adapter_wait=math.inf,
            max_alpha=math.inf,
            seated_alpha=0.0,
            beta=speed,
            credit_gap=10_000.0,
            max_debt=1.0,
            displaced_credit=(1 / (speed * seats), 1 / seats),
            amortise=False,
            max_num_seqs=seats,
            strict_prefix=True,
            paper_times=True,
        )
