"""The load of bench_balance.py, and the open loop that offers it to a service."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.service import EngineService

_LONE = 9
_WARM_SECONDS = 600.0


class Arrival(NamedTuple):
    """A request: seconds from the start, adapter, prompt ids, tokens to draw."""

    at: float
    adapter: str
    prompt: list[int]
    tokens: int


class Offered(Protocol):
    """Requests as a benchmark makes them; the same ones whenever it is asked for the same."""

    @property
    def adapters(self) -> Sequence[str]: ...

    def request(self, rng: random.Random, at: float, adapter: str) -> Arrival:
        """One of the lengths that all have."""
        ...

    def even(self, number: int, seed: int) -> list[Arrival]:
        """So many at once, evenly over the adapters."""
        ...

    def over_time(self, rate: float, seconds: float, seed: int) -> list[Arrival]:
        """In the order of their times, of all adapters together ``rate`` a second."""
        ...


@dataclass(frozen=True)
class Load:
    """Which adapters are asked for how often, and for how much.

    Attributes:
        skew: The n-th adapter's share is in proportion to n^-skew.
        cv: Coefficient of variation of the gaps between an adapter's arrivals; 1 is Poisson.
        longest: Tokens of a prompt and of an answer at most; both are log-normal, with a median of 100.
        end_id: Prompts are random ids from 1000 to below it.
    """

    adapters: Sequence[str]
    skew: float
    cv: float
    longest: int
    end_id: int = 30_000

    def request(self, rng: random.Random, at: float, adapter: str) -> Arrival:
        def draw() -> int:
            return max(4, min(self.longest, int(rng.lognormvariate(math.log(100), 0.8))))

        return Arrival(at, adapter, [rng.randrange(1000, self.end_id) for _ in range(draw())], draw())

    def even(self, number: int, seed: int) -> list[Arrival]:
        """So many at once, evenly over the adapters."""
        rng = random.Random(f"even {seed}")
        return [self.request(rng, 0.0, self.adapters[i % len(self.adapters)]) for i in range(number)]

    def over_time(self, rate: float, seconds: float, seed: int) -> list[Arrival]:
        """As ``arrivals``."""
        return arrivals(self, rate, seconds, seed)


def arrivals(load: Load, rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Of all adapters together ``rate`` a second; each adapter's come from a stream of its own."""
    shares = [(n + 1) ** -load.skew for n in range(len(load.adapters))]
    found = []
    for share, adapter in zip(shares, load.adapters, strict=True):
        rng = random.Random(f"{seed} {adapter}")
        gap = sum(shares) / (share * rate)
        shape = load.cv**-2
        # Behind a first gap of which only a part is left, as for somebody who comes at any time.
        at = rng.random() * rng.gammavariate(shape, gap / shape)
        while at < seconds:
            found.append(load.request(rng, at, adapter))
            at += rng.gammavariate(shape, gap / shape)
    return sorted(found, key=lambda arrival: arrival.at)


@dataclass
class Results:
    """One entry for each request that counts, in seconds.

    Attributes:
        first: From its time of arrival to its first token.
        per_token: From its time of arrival to its last token, by its tokens.
        behind: From its time of arrival to when it was really asked.
        longest_gap: Between two of its tokens.
        asked: How many were asked for, answered or not.
        tokens: Of all; ``seconds`` from the first time that counts to the end of the last request.
    """

    first: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    behind: list[float] = field(default_factory=list)
    longest_gap: list[float] = field(default_factory=list)
    asked: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def late(self, share: float) -> float:
        return quantile(self.behind, share)

    def summary(self, idle: float) -> dict[str, Any]:
        """``idle``: Seconds to a lone request's first token."""
        queueing = [max(0.0, first - idle) for first in self.first]
        return {
            "requests": len(self.first),
            "lost": self.asked - len(self.first),
            "queueing_mean_ms": round(1e3 * statistics.fmean(queueing), 2),
            "queueing_p90_ms": round(1e3 * quantile(queueing, 0.9), 2),
            "queueing_p99_ms": round(1e3 * quantile(queueing, 0.99), 2),
            "mean_s_per_token": round(statistics.fmean(self.per_token), 5),
            "p90_s_per_token": round(quantile(self.per_token, 0.9), 5),
            "longest_gap_p99_ms": round(1e3 * quantile(self.longest_gap, 0.99), 1),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
        }


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


async def until_warm(service: EngineService) -> None:
    """Wait until no replica has anything left to compile or to capture, which they tell the service alone."""
    async with asyncio.timeout(_WARM_SECONDS):
        while not all(view.is_warm for view in service.replicas()):
            await asyncio.sleep(0.1)


async def serve(service: EngineService, planned: Sequence[Arrival], warm: float, label: str) -> Results:
    """Offer requests at their times, whatever becomes of the others; those before ``warm`` do not count."""
    found, start = Results(), time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number, arrival in enumerate(planned):
            await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
            into = found if arrival.at >= warm else Results()
            into.asked += 1
            tasks.create_task(_ask(service, f"{label}.{number}", arrival, start + arrival.at, into))
    found.seconds = time.perf_counter() - start - warm
    return found


async def answer_all(service: EngineService, planned: Sequence[Arrival], turns: int = 2) -> float:
    """Requests per second when all are asked for at once: the best of the runs, as the first has much to set up."""
    best = 0.0
    for turn in range(turns):
        start = time.perf_counter()
        await serve(service, planned, 0.0, f"at once {turn}")
        best = max(best, len(planned) / (time.perf_counter() - start))
    return best


async def answer_most(service: EngineService, planned: Sequence[Arrival], turns: int = 2) -> float:
    """As ``answer_all``, from the end of the first quarter to that of the third; then the others are aborted.

    For lengths with a long tail: at the end few seats are taken, for as long as the longest answer is.
    """
    return max([await _answer_most(service, planned, f"at once {turn}") for turn in range(turns)])


async def _answer_most(service: EngineService, planned: Sequence[Arrival], label: str) -> float:
    start, ends = time.perf_counter(), []
    # Requests by their task.
    names = {
        asyncio.create_task(_ask(service, f"{label}.{number}", arrival, start, Results())): f"{label}.{number}"
        for number, arrival in enumerate(planned)
    }
    first, last = max(1, len(planned) // 4), max(2, 3 * len(planned) // 4)
    try:
        for ended in asyncio.as_completed(names):
            await ended
            ends.append(time.perf_counter())
            if len(ends) >= last:
                break
    finally:
        left = [task for task in names if not task.done()]
        for task in left:
            service.abort(names[task])
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
    return (len(ends) - first) / (ends[-1] - ends[first - 1])


def lone(load: Offered) -> list[Arrival]:
    """Requests to be asked one after another."""
    rng = random.Random("alone")
    return [load.request(rng, 0.0, load.adapters[0])._replace(tokens=4) for _ in range(_LONE)]


async def idle_first_token(service: EngineService, load: Offered) -> float:
    """Median seconds to the first token of requests that are alone."""
    found = Results()
    for number, arrival in enumerate(lone(load)):
        await _ask(service, f"alone.{number}", arrival, time.perf_counter(), found)
    return statistics.median(found.first)


async def _ask(service: EngineService, name: str, arrival: Arrival, due: float, found: Results) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=arrival.tokens, ignore_eos=True)
    asked = time.perf_counter()
    times = [due]
    known = 0
    async for _, progress in service.generate(name, arrival.prompt, params, arrival.adapter):
        if progress.error is not None or progress.first_index != known:
            raise RuntimeError(f"{name}: token {progress.first_index} after {known}: {progress.error}")
        known += len(progress.token_ids)
        times.append(time.perf_counter())
    if known != arrival.tokens:
        raise RuntimeError(f"{name}: {known} tokens of {arrival.tokens}")
    found.first.append(times[1] - due)
    found.per_token.append((times[-1] - due) / known)
    found.behind.append(asked - due)
    found.longest_gap.append(max((after - before for before, after in pairwise(times[1:])), default=0.0))
    found.tokens += known
