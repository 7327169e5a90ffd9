"""Seconds that steps, switches and copies will take, fitted online to those that were measured (``regression.py``)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import msgspec

from peft_dist.core.errors import ConfigError
from peft_dist.core.regression import RESOLUTION, OnlineRegression

SwitchKind = Literal["merge", "unmerge"]
Row = tuple[str, int, int]
"""Adapter (content hash, "" for the base), tokens in this step, rank rows of the adapter."""

FORMAT = 1
# Predictions that a fixed model remembers.
MAX_TOLD = 1 << 14
# Times what was expected, beyond which a switch or a copy is not believed at once; and how many that took what was
# expected, of about the same size, it takes until another such one is not believed again.
OUTLIER, NORMAL_AGAIN = 4.0, 3
# Sizes at which an unknown coefficient of a step may amount to a tenth of the step. Those of the merged terms are
# larger: unless shown otherwise, merged weights are as fast as the base's.
TYPICAL = (1.0, 16.0, 128.0, 10.0, 320.0, 1.0, 32.0, 4.0, 64.0, 512.0)
STEP_TERMS = (
    *("step", "decode_sequence", "prefill_token", "merged_step", "merged_token"),
    *("lora_step", "lora_token", "adapter", "rank_row", "rank_row_token"),
)
REGIMES = ("unmerged", "base", "merged", "corrected")


class StepFeatures(msgspec.Struct, frozen=True):
    """What the seconds of one step depend on.

    Attributes:
        merged: Whether an adapter is merged into the weights.
        decode_sequences: Sequences that compute one token.
        prefill_tokens: Tokens of all other sequences.
        lora_tokens: Tokens that pass through the LoRA kernel.
        adapters: Distinct adapters that the kernel reads.
        rank_rows: Rank rows of these adapters.
        rank_row_tokens: Sum, over the kernel's tokens, of the rank rows each is multiplied with.
    """

    merged: bool
    decode_sequences: int = 0
    prefill_tokens: int = 0
    lora_tokens: int = 0
    adapters: int = 0
    rank_rows: int = 0
    rank_row_tokens: int = 0

    @classmethod
    def of(cls, rows: Iterable[Row], merged_adapter: str | None = None, merged_rank: int = 0) -> StepFeatures:
        """Features of a batch. While merged, rows of the merged adapter cost no LoRA; rows of others (and of the base)
        cost their own delta and the merged one, ``merged_rank`` rank rows, which must be taken off again."""
        decodes = prefill = lora_tokens = row_tokens = 0
        ranks: dict[str, int] = {}
        for adapter, num_tokens, rank in rows:
            decodes += num_tokens == 1
            prefill += num_tokens if num_tokens != 1 else 0
            corrected = merged_adapter is not None and adapter != merged_adapter
            if not corrected and (merged_adapter is not None or not adapter):
                continue
            lora_tokens += num_tokens
            row_tokens += num_tokens * (rank + (merged_rank if corrected else 0))
            if adapter:
                ranks[adapter] = rank
            if merged_adapter is not None:
                ranks[merged_adapter] = merged_rank
        return cls(
            merged_adapter is not None, decodes, prefill, lora_tokens, len(ranks), sum(ranks.values()), row_tokens
        )

    @property
    def regime(self) -> str:
        if self.merged:
            return "corrected" if self.lora_tokens else "merged"
        return "unmerged" if self.lora_tokens else "base"

    def vector(self) -> tuple[float, ...]:
        return (
            1.0,
            self.decode_sequences,
            self.prefill_tokens,
            self.merged,
            self.merged * (self.decode_sequences + self.prefill_tokens),
            self.lora_tokens > 0,
            self.lora_tokens,
            self.adapters,
            self.rank_rows,
            self.rank_row_tokens,
        )


@dataclass(frozen=True, slots=True)
class CostPrior:
    """What to believe before anything was measured: seconds, and seconds per unit.

    ``merge`` and ``unmerge`` are (seconds, seconds per rank row); ``load``, ``swap`` and ``transfer`` are (seconds,
    seconds per byte). The defaults are the order of magnitude of an 8B model on a datacentre GPU.
    """

    step: float = 5e-3
    decode_sequence: float = 2e-5
    prefill_token: float = 5e-5
    merged_step: float = 0.0
    merged_token: float = 0.0
    lora_step: float = 1e-3
    lora_token: float = 1e-5
    adapter: float = 2e-5
    rank_row: float = 0.0
    rank_row_token: float = 0.0
    merge: tuple[float, float] = (20e-3, 0.0)
    unmerge: tuple[float, float] = (20e-3, 0.0)
    load: tuple[float, float] = (1e-3, 1e-10)
    swap: tuple[float, float] = (1e-3, 1e-10)
    transfer: tuple[float, float] = (1e-3, 1e-10)

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            for number in value if isinstance(value, tuple | list) else (value,):
                if not (math.isfinite(number) and number >= 0):
                    raise ConfigError(f"cost prior {name}={value} must be finite seconds of zero or more")

    def step_coefficients(self) -> tuple[float, ...]:
        """In the order of ``StepFeatures.vector``."""
        return tuple(getattr(self, name) for name in STEP_TERMS)


class CostModel:
    """Predicts seconds of steps, switches, loads, swaps and transfers.

    A model that is ``fixed`` ignores observations: its predictions are those of its prior.
    """

    def __init__(self, prior: CostPrior | None = None, *, fixed: bool = False) -> None:
        self.prior = prior or CostPrior()
        self.fixed = fixed
        self.num_steps = 0
        # By what and the octave of its size: one took so much more than expected that it is believed only when it
        # happens again, before so many have taken what was expected.
        self._in_doubt: dict[tuple[str, int], int] = {}
        # Of a fixed model, what it predicts.
        self._told: dict[StepFeatures, float] = {}
        self._told_others: dict[tuple[str, int], float] = {}
        self._step = OnlineRegression(self.prior.step_coefficients(), TYPICAL, REGIMES)
        self._others = {
            name: OnlineRegression(getattr(self.prior, name), (1.0, size), (name,))
            for name, size in [("merge", 64.0), ("unmerge", 64.0), ("load", 1e8), ("swap", 1e8), ("transfer", 1e8)]
        }

    @classmethod
    def paper(cls) -> CostModel:
        """What dLoRA's authors measured for Llama-2-7B and wrote into their artifact (OSDI'24), whatever a batch holds:
        15 ms for a merged step, 27 ms for an unmerged one, 20 ms for a switch. Fixed."""
        flat = CostPrior(15e-3, decode_sequence=0, prefill_token=0, lora_step=12e-3, lora_token=0, adapter=0)
        return cls(flat, fixed=True)

    def step_seconds(self, features: StepFeatures) -> float:
        if not self.fixed:
            return self._step.predict(features.vector())
        seconds = self._told.get(features)
        if seconds is None:
            if len(self._told) >= MAX_TOLD:
                self._told.clear()
            seconds = self._told[features] = self._step.predict(features.vector())
        return seconds

    def step_coefficients(self) -> tuple[float, ...]:
        """In the order of ``StepFeatures.vector``."""
        return tuple(self._step.coefficients)

    def load_coefficients(self) -> tuple[float, float]:
        """Seconds of a load, and seconds per byte."""
        base, per_byte = self._others["load"].coefficients
        return base, per_byte

    def transfer_coefficients(self) -> tuple[float, float]:
        """Seconds of moving a request's KV to another replica, and seconds per byte."""
        base, per_byte = self._others["transfer"].coefficients
        return base, per_byte

    def switch_coefficients(self) -> tuple[float, float]:
        """Seconds of merging and unmerging an adapter, and seconds per rank row."""
        (merge, per_merged), (unmerge, per_unmerged) = (
            self._others[name].coefficients for name in ("merge", "unmerge")
        )
        return merge + unmerge, per_merged + per_unmerged

    def switch_seconds(self, current: str | None, target: str | None, rank_rows: int = 0) -> float:
        """From one merged adapter (None: unmerged) to another; ``rank_rows`` are those of ``target``.

        Merging over a merged adapter needs no unmerge between."""
        if current == target:
            return 0.0
        kind = "unmerge" if target is None else "merge"
        known = self._told_others.get((kind, rank_rows))
        return self._predict(kind, rank_rows) if known is None else known

    def load_seconds(self, num_bytes: int) -> float:
        """Bring an adapter from the host to the device."""
        return self._predict("load", num_bytes)

    def swap_seconds(self, num_bytes: int) -> float:
        """Move KV blocks between device and host."""
        return self._predict("swap", num_bytes)

    def transfer_seconds(self, num_bytes: int) -> float:
        """Move KV blocks or adapters to another replica."""
        return self._predict("transfer", num_bytes)

    def observe_step(self, features: StepFeatures, seconds: float) -> None:
        """Learn from a measured step. Raises ValueError for a negative or infinite duration, as all ``observe`` do."""
        if not self.fixed:
            self.num_steps += 1
            self._step.observe(features.vector(), seconds, features.regime)

    def observe_switch(self, kind: SwitchKind, seconds: float, rank_rows: int = 0) -> None:
        self._observe(kind, rank_rows, seconds)

    def observe_load(self, num_bytes: int, seconds: float) -> None:
        self._observe("load", num_bytes, seconds)

    def observe_swap(self, num_bytes: int, seconds: float) -> None:
        self._observe("swap", num_bytes, seconds)

    def observe_transfer(self, num_bytes: int, seconds: float) -> None:
        self._observe("transfer", num_bytes, seconds)

    def _predict(self, name: str, size: int) -> float:
        if not self.fixed:
            return self._others[name].predict((1.0, size))
        seconds = self._told_others.get((name, size))
        if seconds is None:
            if len(self._told_others) >= MAX_TOLD:
                self._told_others.clear()
            seconds = self._told_others[name, size] = self._others[name].predict((1.0, size))
        return seconds

    def _observe(self, name: str, size: int, seconds: float) -> None:
        if self.fixed:
            return
        # Few are seen, so that one counts for much; the first of its kind, which compiles kernels, is an outlier.
        key, expected = (name, size.bit_length()), max(self._predict(name, size), RESOLUTION)
        doubt = self._in_doubt.pop(key, 0)
        if math.isfinite(seconds) and seconds > OUTLIER * expected:
            if not doubt:
                self._in_doubt[key] = NORMAL_AGAIN
                return
        elif doubt > 1:
            self._in_doubt[key] = doubt - 1
        self._others[name].observe((1.0, size), seconds, name)

    def to_dict(self) -> dict[str, Any]:
        """The whole state in JSON's types: a profile that a simulator, or the next start, continues from."""
        return {
            "format": FORMAT,
            "fixed": self.fixed,
            "num_steps": self.num_steps,
            "prior": asdict(self.prior),
            "step": self._step.state(),
            "in_doubt": [[*key, left] for key, left in self._in_doubt.items()],
            **{name: regression.state() for name, regression in self._others.items()},
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> CostModel:
        """Inverse of ``to_dict``. Raises ConfigError when ``state`` is no cost profile of this version."""
        if state.get("format") != FORMAT:
            raise ConfigError(f"cost profile of format {state.get('format')!r}: this version reads format {FORMAT}")
        try:
            prior: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in state["prior"].items()
            }
            model = cls(CostPrior(**prior), fixed=bool(state["fixed"]))
            model.num_steps = int(state["num_steps"])
            model._step.restore(state["step"])
            # Files from before it was kept have none.
            model._in_doubt = {(str(name), int(octave)): int(left) for name, octave, left in state.get("in_doubt", [])}
            for name, regression in model._others.items():
                regression.restore(state[name])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"broken cost profile ({error!r}): measure it again") from error
        return model
