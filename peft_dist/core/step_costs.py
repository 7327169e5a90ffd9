"""What a replica's work costs, in the few numbers that those who route to it need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from operator import mul

import msgspec

from peft_dist.core.cost_model import STEP_TERMS, CostModel, CostPrior, StepFeatures

_PREFILL_TOKEN = STEP_TERMS.index("prefill_token")
_LEAST_RATIO = 0.01


class StepCosts(msgspec.Struct, frozen=True):
    """Coefficients of a cost model, as its replica reports them.

    Attributes:
        step: Seconds for each feature of a step, in the order of ``StepFeatures.vector``.
        load: Seconds of one load of an adapter from the host, and seconds for each of its bytes.
        fetch: The same of bringing it to the host from disk: a guess, nobody measures it.
        transfer: Seconds of moving a request's KV to another replica, and seconds for each of its bytes.
        switch: Seconds of merging an adapter and of bringing the base back, and seconds for each of its rank rows; None
            for a replica that does not merge, or not for its own gain.
    """

    step: tuple[float, ...] = CostPrior().step_coefficients()
    load: tuple[float, float] = CostPrior().load
    fetch: tuple[float, float] = (1e-2, 1e-9)
    transfer: tuple[float, float] = CostPrior().transfer
    switch: tuple[float, float] | None = None

    @classmethod
    def of(cls, model: CostModel, *, merges: bool = False) -> StepCosts:
        return cls(
            step=model.step_coefficients(),
            load=model.load_coefficients(),
            transfer=model.transfer_coefficients(),
            switch=model.switch_coefficients() if merges else None,
        )

    def prefill_seconds(self, num_tokens: int) -> float:
        """What so many prompt tokens add to the steps that compute them."""
        # Written out: it is asked of every replica for every request that is dispatched.
        base = self.step[0]
        return base + self.step[_PREFILL_TOKEN] * num_tokens - base

    def decode_seconds(self, num_base: int, adapters: Mapping[str, tuple[int, int]], share: float = 1.0) -> float:
        """One unmerged step that draws a token for each sequence, or for this share of the sequences of each adapter.

        Args:
            num_base: Sequences of the base.
            adapters: Sequences and rank rows of each adapter.
        """
        rows = rank_rows = products = 0
        for number, rank in adapters.values():
            rows += number
            rank_rows += rank
            products += number * rank
        return self.counted_seconds(num_base + rows, rows, len(adapters), rank_rows, products, share)

    def counted_seconds(
        self, num_sequences: int, num_lora: int, num_adapters: int, rank_rows: int, products: int, share: float = 1.0
    ) -> float:
        """``decode_seconds`` for who has counted: sequences, those with an adapter, distinct adapters, their rank rows,
        and the sum of the rank rows of all sequences."""
        if share != 1.0:
            num_sequences, num_lora = math.ceil(num_sequences * share), math.ceil(num_lora * share)
            products = math.ceil(products * share)
        # Written out, in the order of ``StepFeatures.vector``: it is asked whenever a request has come or gone.
        vector = (1.0, num_sequences, 0, 0, 0, num_lora > 0, num_lora, num_adapters, rank_rows, products)
        return float(sum(map(mul, self.step, vector)))

    def merged_seconds(self, num_sequences: int) -> float:
        """One step that draws a token for each of so many sequences of the adapter that is merged."""
        return _merged_seconds(self.step, num_sequences)

    def merged_ratio(self, num_sequences: int, unmerged_seconds: float) -> float:
        """``merged_seconds`` as a part of an unmerged step's seconds, above 0: a model that has seen few steps may put
        all that they took to the adapters, or to nothing."""
        if unmerged_seconds <= 0.0:
            return 1.0
        return max(self.merged_seconds(num_sequences) / unmerged_seconds, _LEAST_RATIO)

    def switch_seconds(self, rank_rows: int) -> float:
        """Merge an adapter and bring the base back; infinite for a replica that does not."""
        return math.inf if self.switch is None else self.switch[0] + self.switch[1] * rank_rows

    def load_seconds(self, num_bytes: int, *, on_host: bool = True) -> float:
        """Bring an adapter to the device, from the host or from disk."""
        fetch = 0.0 if on_host else self.fetch[0] + self.fetch[1] * num_bytes
        return fetch + self.load[0] + self.load[1] * num_bytes

    def transfer_seconds(self, num_bytes: int) -> float:
        """Bring a request's KV from another replica."""
        return self.transfer[0] + self.transfer[1] * num_bytes


@lru_cache(maxsize=1 << 12)
def _merged_seconds(step: tuple[float, ...], num_sequences: int) -> float:
    features = StepFeatures(True, decode_sequences=num_sequences)
    return float(sum(map(mul, step, features.vector())))
