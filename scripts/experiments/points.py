"""Points of figures, and what is measured at them: in simulation by several processes, or live one after another."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace

from experiments import live, loads
from experiments.loads import Data, LoadSpec, make
from experiments.measured import Asked, Measured
from experiments.simulated import simulated


@dataclass(frozen=True, slots=True)
class Point:
    """One run.

    Attributes:
        system: Name of one of ``systems.SYSTEMS``.
        model: "7b", "13b" or "70b"; the name of the one served where it is live.
        replicas: Of the cluster.
    """

    system: str
    model: str
    replicas: int
    load: LoadSpec

    def __str__(self) -> str:
        load = self.load
        skew = f", stride {load.stride}" * (load.stride > 1) + f", ratio {load.ratio:g}" * (load.ratio > 1)
        return f"{self.system}, {load.trace} {self.model}, {load.adapters} adapters, rate {load.rate:g}{skew}"


Ladder = Sequence[Point]
"""Points of one system under rising load. Beyond one whose mean exceeds a bound nothing more is learnt."""

Found = list[tuple[Point, Measured]]


def run(
    ladders: Sequence[Ladder], data: Data, bound: float | None, jobs: int = 1, server: live.Server | None = None
) -> Found:
    """What was measured, in the order of the points; a ladder ends after a mean of more than ``bound`` s/token.

    Files are read before anything is run, and once for all processes: ShareGPT's texts take minutes to count.
    """
    read = loads.read_ahead(dict.fromkeys(point.load for ladder in ladders for point in ladder), data)
    if server is not None or jobs == 1:
        return [found for ladder in ladders for found in _climb(ladder, data, server, bound)]
    with ProcessPoolExecutor(jobs, initializer=loads.given, initargs=(read,)) as pool:
        climbing = [pool.submit(_climb, ladder, data, None, bound) for ladder in ladders]
        try:
            for done in as_completed(climbing):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [found for one in climbing for found in one.result()]


def _climb(ladder: Ladder, data: Data, server: live.Server | None, bound: float | None) -> Found:
    found: Found = []
    names = None if server is None else live.adapters_of(server.url)
    for point in ladder:
        start = time.perf_counter()
        workload = make(point.load, data, names)
        if server is None:
            measured = simulated(point.system, point.model, point.replicas, workload, point.load)
        else:
            measured = live.run(workload, server)
        measured = replace(measured, asked=Asked.of(workload))
        found.append((point, measured))
        _tell(point, measured, time.perf_counter() - start)
        if bound is not None and (measured.avg_lat is None or measured.avg_lat > bound):
            break
    return found


def _tell(point: Point, measured: Measured, seconds: float) -> None:
    mean = "nothing answered" if measured.avg_lat is None else f"mean {measured.avg_lat:.4f} s/token"
    print(f"{point}: {mean}, {measured.tot_time:.0f} s of it in {seconds:.1f} s", file=sys.stderr, flush=True)
