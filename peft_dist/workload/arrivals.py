"""When requests come, and for which adapter: superposed Gamma renewal processes, one for each adapter."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_dist.core.errors import ConfigError

Floats = NDArray[np.float64]

# Gaps drawn at once: few enough that a cold adapter wastes little, enough that a hot one seldom comes back.
_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request.

    Attributes:
        time: Seconds from the start of the workload.
        adapter: Name, or None for the base model.
        prompt_tokens: At least 1.
        output_tokens: At least 1.
    """

    time: float
    adapter: str | None
    prompt_tokens: int
    output_tokens: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.time) and self.time >= 0):
            raise ConfigError(f"an arrival at {self.time} s: it must be a number of seconds, 0 or more")
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ConfigError(
                f"an arrival at {self.time} s has {self.prompt_tokens} prompt and {self.output_tokens} output tokens: "
                "each must be at least 1"
            )


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in the order of their times.

    ``source`` tells where times, popularity and lengths come from, what is synthetic, and the seed; it goes with the
    requests into every file and every result.
    """

    arrivals: tuple[Arrival, ...]
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for earlier, later in itertools.pairwise(self.arrivals):
            if later.time < earlier.time:
                raise ConfigError(f"the arrival at {later.time} s stands behind one at {earlier.time} s: sort by time")

    @property
    def adapters(self) -> list[str | None]:
        """Names that occur, each once, in the order of their first request."""
        return list(dict.fromkeys(arrival.adapter for arrival in self.arrivals))

    @property
    def duration(self) -> float:
        """Seconds until the last arrival."""
        return self.arrivals[-1].time if self.arrivals else 0.0


def uniform(num_adapters: int) -> Floats:
    """Every adapter's share of the requests, all equal. Shape [num_adapters]."""
    return zipf(num_adapters, 0.0)


def zipf(num_adapters: int, exponent: float) -> Floats:
    """Shares that fall with the power ``exponent`` of the rank; the first adapter is the hottest. Sums to 1."""
    if num_adapters < 1:
        raise ConfigError(f"{num_adapters} adapters: there must be at least one")
    if not (math.isfinite(exponent) and exponent >= 0):
        raise ConfigError(f"a Zipf exponent of {exponent}: it must be a number, 0 (uniform) or more")
    weights: Floats = np.arange(1, num_adapters + 1, dtype=np.float64) ** -exponent
    return weights / float(weights.sum())


def gamma_times(seed: Sequence[int], rate: float, cv: float) -> Iterator[float]:
    """Endless times, in seconds, of a Gamma renewal process that has been running for ever.

    The gaps have the mean ``1 / rate`` and the coefficient of variation ``cv`` (1: a Poisson process). The first time
    is the rest of the gap that is under way at 0: a uniform share of a gap chosen with a probability that is
    proportional to its length, which for Gamma gaps of shape k is one of shape k + 1. Without it a bursty process
    would have ``(cv**2 - 1) / 2`` arrivals too many at its start.
    """
    generator = np.random.default_rng(seed)
    shape, scale = 1 / cv**2, cv**2 / rate
    first = generator.random() * generator.gamma(shape + 1, scale)
    yield first
    yield from _sums(lambda: generator.gamma(shape, scale, _BLOCK), first)


def correlated_gamma_times(seed: int, rate: float, cv: float) -> Iterator[float]:
    """As the dLoRA artifact draws them: every process begins NumPy's old generator anew from one seed.

    So all processes share one sequence of gaps, each scaled by its own rate, and begin with a whole gap.
    """
    generator = np.random.RandomState(seed)
    shape, scale = 1 / cv**2, cv**2 / rate
    yield from _sums(lambda: generator.gamma(shape, scale, _BLOCK), 0.0)


def _sums(draw: Callable[[], Floats], start: float) -> Iterator[float]:
    while True:
        block = start + np.cumsum(draw())
        yield from block.tolist()
        start = float(block[-1])


def merged(
    shares: Floats, rate: float, count: int, *, cv: float, seed: int, stream: int = 0, correlated: bool = False
) -> list[tuple[float, int]]:
    """The first ``count`` arrivals of all adapters together, as (seconds, index of the adapter).

    Args:
        shares: Of the requests, by adapter; only their proportions count. Shape [adapters].
        rate: Requests a second of all adapters together.
        cv: Coefficient of variation of the gaps of each adapter.
        seed: An adapter's stream depends on this, on ``stream`` and on its index, and on nothing else.
        stream: Tells apart the intervals of one workload.
        correlated: Draw as the artifact does, see ``correlated_gamma_times``; ``stream`` is not used.
    """
    check(rate, cv, seed)
    if count < 0:
        raise ConfigError(f"{count} requests: there must be 0 or more")
    total = float(shares.sum())
    if not (np.all(np.isfinite(shares)) and np.all(shares >= 0) and total > 0):
        raise ConfigError("the adapters' shares must be numbers of 0 or more, and not all 0")

    def times(index: int) -> Iterator[tuple[float, int]]:
        own = rate * float(shares[index]) / total
        drawn = correlated_gamma_times(seed, own, cv) if correlated else gamma_times((seed, stream, index), own, cv)
        return ((time, index) for time in drawn)

    streams = [times(index) for index in range(len(shares)) if shares[index] > 0]
    return list(itertools.islice(heapq.merge(*streams), count))


def check(rate: float, cv: float, seed: int) -> None:
    """Raises ConfigError for a rate, cv or seed that no process can have."""
    if not (math.isfinite(rate) and rate > 0):
        raise ConfigError(f"a rate of {rate} requests a second: it must be above 0")
    if not 1e-3 <= cv <= 1e3:
        raise ConfigError(f"a cv of {cv}: it must be from 0.001 (regular) to 1000; 1 is a Poisson process")
    if seed < 0:
        raise ConfigError(f"the seed {seed}: it must be 0 or more")


def join(times: Sequence[tuple[float, int]], names: Sequence[str], lengths: NDArray[np.int64]) -> tuple[Arrival, ...]:
    """Arrivals from times and sizes. ``lengths``: prompt and output tokens of each, shape [requests, 2]."""
    sizes = lengths.tolist()
    return tuple(
        Arrival(time, names[index], prompt, output)
        for (time, index), (prompt, output) in zip(times, sizes, strict=True)
    )
