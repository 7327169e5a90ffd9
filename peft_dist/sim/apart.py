"""Replicas that share nothing: each adapter has one of them, for good."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_dist.sim.experiment import SimulationResult
    from peft_dist.sim.options import SimulationOptions
    from peft_dist.workload.arrivals import Arrival


def run_apart(
    arrivals: Sequence[Arrival],
    names: Sequence[str],
    options: SimulationOptions,
    spread: bool,
    run: Callable[[Sequence[Arrival], SimulationOptions], SimulationResult],
) -> SimulationResult:
    """One result of runs with a replica each.

    Args:
        names: All adapters. Parts of replicas are equal but for one adapter.
        spread: Whether adapters go to the replicas in turn. Else replica i has the i-th part of them in a row, as the
            artifact places its vLLM's models: where a trace has fewer functions than there are adapters, which then are
            the first ones, the last replicas stay idle.
        run: Simulates one replica. Requests of the base go to the first.
    """
    count = options.replicas
    home = {n: i % count if spread else i * count // len(names) for i, n in enumerate(names)}
    parts: list[list[int]] = [[] for _ in range(options.replicas)]
    for index, arrival in enumerate(arrivals):
        parts[home[arrival.adapter] if arrival.adapter is not None else 0].append(index)
    results = []
    for number, part in enumerate(parts):
        own = tuple(name for name in names if home[name] == number)
        results.append(run([arrivals[index] for index in part], replace(options, replicas=1, adapters=own)))
    records = [
        replace(record, index=index)
        for part, result in zip(parts, results, strict=True)
        for index, record in zip(part, result.records, strict=True)
    ]
    return replace(
        results[0],
        records=tuple(sorted(records, key=lambda record: record.index)),
        replicas=tuple(replace(result.replicas[0], replica=number) for number, result in enumerate(results)),
        seconds=max(result.seconds for result in results),
        source={**results[0].source, "options": options.told()},
        wall_seconds=sum(result.wall_seconds for result in results),
        events=sum(result.events for result in results),
    )
