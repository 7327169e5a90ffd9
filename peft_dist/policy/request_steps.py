"""How many steps requests run before they end."""

from __future__ import annotations

from collections.abc import Iterable

# Share of the newest request in the running mean.
RATE = 0.05


class RequestSteps:
    """Running mean of the steps of ended requests, expected of every request again: nothing is known beforehand."""

    def __init__(self, expected: float) -> None:
        self.mean = expected
        self._steps: dict[str, int] = {}

    def ran(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._steps[request_id] = self._steps.get(request_id, 0) + 1

    def ended(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            steps = self._steps.pop(request_id, 0)
            if steps:
                self.mean += RATE * (steps - self.mean)
