"""Linear functions with coefficients of zero or more, fitted online to what was measured.

Every kind of work is a linear function of its size with coefficients of zero or more, so that predictions are never
negative and grow with every feature. Coefficients minimise the relative errors of what was observed, older
observations counting less, with a pull towards a prior for what was never observed (ridge regression with
exponential forgetting, solved by coordinate descent on its normal equations). An outlier, such as a step during which
something compiled, hardly counts, since its error is relative to its own length. When predictions stay wrong by one
factor, all coefficients are multiplied by it: a machine that slows down does so in every mode, also in those not
observed since.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import mul
from typing import Any

# A few hundred steps: seconds of traffic, enough for ten coefficients.
MEMORY = 300
SWEEPS = 3
# Mean logarithm of measured over predicted beyond which all modes are taken to have changed alike.
MAX_DRIFT = 0.4
# Share of the newest observation in the running mean of this logarithm.
RATE = 0.1
# Weight of the prior, in observations: enough to decide what was never observed, and nothing else.
PRIOR_WEIGHT = 1e-4
# Errors are relative, but below a millisecond they are noise.
RESOLUTION = 1e-3


class OnlineRegression:
    """Non-negative linear regression, updated by one observation at a time.

    Observations come in regimes, each with a memory of its own: while one regime lasts, what the others taught is
    not forgotten, so that the difference between two modes stays known.
    """

    def __init__(self, prior: Sequence[float], typical: Sequence[float], regimes: Sequence[str]) -> None:
        self.prior = list(prior)
        self.coefficients = list(prior)
        self.drift = 0.0
        unit = max(sum(p * t for p, t in zip(prior, typical, strict=True)), RESOLUTION)
        self._stiffness = [PRIOR_WEIGHT / max(p, 0.1 * unit / t) ** 2 for p, t in zip(prior, typical, strict=True)]
        size = len(self.prior)
        self._products = {regime: [[0.0] * size for _ in range(size)] for regime in regimes}
        self._targets = {regime: [0.0] * size for regime in regimes}

    def predict(self, features: Sequence[float]) -> float:
        return float(sum(map(mul, self.coefficients, features)))

    def observe(self, features: Sequence[float], value: float, regime: str) -> None:
        """Learn one value (finite, zero or more; anything else is no measurement and raises ValueError)."""
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"cannot learn from a duration of {value} seconds")
        predicted = self.predict(features)
        # Errors are relative to the larger of both: what took far too long hardly counts.
        unit = max(predicted, value, RESOLUTION)
        self._accumulate([x / unit for x in features], value / unit, regime)
        self._solve()
        ratio = max(value, RESOLUTION) / max(predicted, RESOLUTION)
        self.drift += RATE * (min(max(math.log(ratio), -1.0), 1.0) - self.drift)
        if abs(self.drift) > MAX_DRIFT:
            self._rescale(math.exp(self.drift))
            self.drift = 0.0

    def state(self) -> dict[str, Any]:
        return {
            "prior": list(self.prior),
            "stiffness": list(self._stiffness),
            "coefficients": list(self.coefficients),
            "drift": self.drift,
            "products": {regime: [list(row) for row in rows] for regime, rows in self._products.items()},
            "targets": {regime: list(targets) for regime, targets in self._targets.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state()``. Raises ValueError when it is of another shape."""
        products, targets = state["products"], state["targets"]
        vectors = [state["prior"], state["stiffness"], state["coefficients"], *targets.values()]
        vectors += [*products.values(), *(row for rows in products.values() for row in rows)]
        known = self._products.keys()
        if products.keys() != known or targets.keys() != known or {len(v) for v in vectors} != {len(self.prior)}:
            raise ValueError("the state belongs to a regression with other features")
        self.prior, self._stiffness = _floats(state["prior"]), _floats(state["stiffness"])
        self.coefficients = _floats(state["coefficients"])
        self.drift = float(state["drift"])
        self._products = {regime: [_floats(row) for row in rows] for regime, rows in products.items()}
        self._targets = {regime: _floats(row) for regime, row in targets.items()}

    def _rescale(self, factor: float) -> None:
        """Everything takes ``factor`` times as long as it did: the machine changed, or the prior was of another."""
        self.prior = [factor * p for p in self.prior]
        self.coefficients = [factor * c for c in self.coefficients]
        self._stiffness = [s / factor**2 for s in self._stiffness]
        for regime, products in self._products.items():
            self._products[regime] = [[p / factor**2 for p in row] for row in products]
            self._targets[regime] = [t / factor for t in self._targets[regime]]

    def _accumulate(self, x: list[float], y: float, regime: str) -> None:
        keep = 1.0 - 1.0 / MEMORY
        targets = self._targets[regime]
        for i, row in enumerate(self._products[regime]):
            self._products[regime][i] = [keep * p + x[i] * xj for p, xj in zip(row, x, strict=True)]
            targets[i] = keep * targets[i] + x[i] * y

    def _solve(self) -> None:
        """A few sweeps of coordinate descent from the last solution, which the next observation continues."""
        theta = self.coefficients
        size = range(len(theta))
        matrices, vectors = list(self._products.values()), list(self._targets.values())
        total = [list(map(sum, zip(*(m[i] for m in matrices), strict=True))) for i in size]
        target = [sum(v[i] for v in vectors) + self._stiffness[i] * self.prior[i] for i in size]
        for _ in range(SWEEPS):
            for i in size:
                row = total[i]
                rest = sum(map(mul, row, theta)) - row[i] * theta[i]
                theta[i] = max(0.0, (target[i] - rest) / (row[i] + self._stiffness[i]))


def _floats(values: Iterable[Any]) -> list[float]:
    return [float(value) for value in values]
