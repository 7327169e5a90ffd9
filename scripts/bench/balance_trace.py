"""The load of Figure 11a for bench_balance.py: MAF2's functions, the most popular first, with ShareGPT's lengths."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments.loads import Data, LoadSpec, make

from bench.balance_load import Arrival, Load, Offered


@dataclass(frozen=True)
class TraceLoad:
    """As the figure's experiment asks for it, with these adapters.

    Attributes:
        max_total: Most tokens of a prompt and its answer together.
        data: Where the trace and the lengths come from.
        end_id: As of ``Load``.
    """

    adapters: Sequence[str]
    max_total: int
    data: Data
    end_id: int = 30_000

    def request(self, rng: random.Random, at: float, adapter: str) -> Arrival:
        [one] = self._made(1.0, 1, rng.randrange(1 << 30))
        return one._replace(at=at, adapter=adapter)

    def even(self, number: int, seed: int) -> list[Arrival]:
        """So many at once, of the trace's lengths, evenly over the adapters."""
        return [
            one._replace(at=0.0, adapter=self.adapters[index % len(self.adapters)])
            for index, one in enumerate(self._made(1.0, number, seed))
        ]

    def over_time(self, rate: float, seconds: float, seed: int) -> list[Arrival]:
        """The trace's popularity from hour to hour; as many requests as come in these seconds on average."""
        return self._made(rate, max(1, round(rate * seconds)), seed)

    def _made(self, rate: float, count: int, seed: int) -> list[Arrival]:
        spec = LoadSpec("maf2", "0.0.0-0.6.0", rate, count, len(self.adapters), need_sort=True, seed=seed)
        rows = make(replace(spec, max_total=self.max_total), self.data, self.adapters).arrivals
        rng = random.Random(f"trace {seed}")
        found = []
        for row in rows:
            assert row.adapter is not None  # ``make`` gives each request one of those named.
            prompt = [rng.randrange(1000, self.end_id) for _ in range(row.prompt_tokens)]
            found.append(Arrival(row.time, row.adapter, prompt, row.output_tokens))
        return found


def offered(options: argparse.Namespace, adapters: Sequence[str], data: Data) -> Offered:
    """What the options ask for."""
    if options.trace:
        return TraceLoad(adapters, options.max_total, data, options.end_id)
    return Load(adapters, options.skew, options.cv, options.longest, options.end_id)
