"""Costs from measured seconds: what ``CostModel`` learns while it serves, here from all measurements at once."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from peft_dist.core.cost_model import STEP_TERMS, CostPrior, StepFeatures

# With adapters of one rank they cannot be told from the costs of an adapter and of a token.
RANK_TERMS = ("rank_row", "rank_row_token")
_SWEEPS = 20_000
_SETTLED = 1e-10
# Of a coefficient that no measurement tells from others: small enough to change no prediction.
_RIDGE = 1e-6


class Median(NamedTuple):
    """What equal steps took: how many were measured, and the median of their seconds."""

    features: StepFeatures
    number: int
    seconds: float


def medians(measured: Iterable[tuple[StepFeatures, float]]) -> list[Median]:
    """One of each kind of step, in the order in which they first came."""
    groups: dict[StepFeatures, list[float]] = defaultdict(list)
    for features, seconds in measured:
        groups[features].append(seconds)
    return [Median(features, len(own), statistics.median(own)) for features, own in groups.items()]


def predicted(coefficients: Mapping[str, float], features: StepFeatures) -> float:
    """Seconds of a step."""
    return sum(coefficients[name] * x for name, x in zip(STEP_TERMS, features.vector(), strict=True))


def fit_steps(measured: Iterable[tuple[StepFeatures, float]], *, one_rank: bool = True) -> dict[str, float]:
    """Coefficients of a step, by the names of ``CostPrior``.

    Args:
        measured: Features and seconds. Of equal features the median counts, as one measurement.
        one_rank: All adapters had the same rank: ``RANK_TERMS`` are 0.
    """
    found = medians(measured)
    left_out = {STEP_TERMS.index(name) for name in RANK_TERMS} if one_rank else set()
    rows = [[0.0 if i in left_out else x for i, x in enumerate(one.features.vector())] for one in found]
    return dict(zip(STEP_TERMS, nonnegative(rows, [one.seconds for one in found]), strict=True))


class WithContext(NamedTuple):
    """Costs of a step with decodes of ``context`` tokens, by the names of ``CostPrior``; all as in ``CostProfile``."""

    step: dict[str, float]
    context_token: float
    context: float

    def predicted(self, features: StepFeatures, num_cached: int) -> float:
        """Seconds of a step. ``num_cached``: Tokens in the KV cache before it, of all its decodes together."""
        beyond = num_cached - self.context * features.decode_sequences
        return predicted(self.step, features) + self.context_token * beyond

    def scaled(self, factor: float) -> WithContext:
        """All seconds times a factor."""
        step = {name: factor * seconds for name, seconds in self.step.items()}
        return WithContext(step, factor * self.context_token, self.context)


def fit_with_context(measured: Sequence[tuple[StepFeatures, int, float]], like: CostPrior) -> WithContext:
    """Coefficients of steps of adapters of one rank, each measured once and of decodes with contexts of their own.

    Args:
        measured: Features; tokens in the KV cache before the step, of all its decodes together; seconds.
        like: Each of its terms counts as one measurement more: it decides between terms that none of the others tells
            apart, as where no step was of the base alone.
    """
    left_out = {STEP_TERMS.index(name) for name in RANK_TERMS}
    rows = [
        [*(0.0 if i in left_out else x for i, x in enumerate(features.vector())), float(cached)]
        for features, cached, _ in measured
    ]
    believed = like.step_coefficients()
    rows += [[float(i == j and i not in left_out) for j in range(len(believed) + 1)] for i in range(len(believed))]
    *found, token = nonnegative(rows, [*(seconds for _, _, seconds in measured), *believed])
    step = dict(zip(STEP_TERMS, found, strict=True))
    decodes = sum(features.decode_sequences for features, _, _ in measured)
    context = sum(cached for _, cached, _ in measured) / decodes if decodes else 0.0
    step["decode_sequence"] += token * context
    return WithContext(step, token, context)


def fit_line(measured: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Seconds, and seconds for each unit of size; (0, 0) for no measurement, and no fixed part where one size is."""
    sizes: dict[int, list[float]] = defaultdict(list)
    for size, seconds in measured:
        sizes[size].append(seconds)
    constant = 1.0 if len(sizes) > 1 or 0 in sizes else 0.0
    found = nonnegative([[constant, size] for size in sizes], [statistics.median(v) for v in sizes.values()])
    return (found[0], found[1]) if found else (0.0, 0.0)


def mean_error(coefficients: Mapping[str, float], measured: Iterable[tuple[StepFeatures, float]]) -> float:
    """Mean, over the kinds of steps, of the relative distance between the fit and the median of the seconds."""
    found = medians(measured)
    errors = [abs(predicted(coefficients, one.features) / one.seconds - 1) for one in found if one.seconds > 0]
    return statistics.fmean(errors) if errors else 0.0


def nonnegative(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float]:
    """Coefficients of 0 or more with the least sum of squared relative errors, by coordinate descent.

    Args:
        rows: Features of each measurement, shape [measurements, features].
        values: Seconds; those of 0 are left out.
    """
    used = [([x / value for x in row], value) for row, value in zip(rows, values, strict=True) if value > 0]
    if not used:
        return [0.0] * (len(rows[0]) if rows else 0)
    size = len(used[0][0])
    scale = [max(row[i] for row, _ in used) or 1.0 for i in range(size)]
    scaled = [[x / s for x, s in zip(row, scale, strict=True)] for row, _ in used]
    matrix = [[sum(row[i] * row[j] for row in scaled) for j in range(size)] for i in range(size)]
    target = [sum(row[i] for row in scaled) for i in range(size)]
    found = [0.0] * size
    for _ in range(_SWEEPS):
        moved = 0.0
        for i in range(size):
            rest = sum(a * x for a, x in zip(matrix[i], found, strict=True)) - matrix[i][i] * found[i]
            new = max(0.0, (target[i] - rest) / (matrix[i][i] + _RIDGE))
            moved, found[i] = max(moved, abs(new - found[i])), new
        if moved < _SETTLED:
            break
    return [x / s for x, s in zip(found, scale, strict=True)]
