"""One replica in this process, driven in real time as a worker drives it: for machines without a server's packages."""

from __future__ import annotations

import argparse
import itertools
import random
import select
import time
from pathlib import Path

import profile_costs
from bench.cost_runs import CostRuns

from peft_dist.core.collector import freeze_heap
from peft_dist.core.messages import AddRequest, AnyReport, Progress, encode_report
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.engine.driver import EngineDriver
from peft_dist.sim.profile import CostProfile
from peft_dist.workload.arrivals import Arrival, Workload
from peft_dist.workload.records import RequestRecord


def measured_replica(options: argparse.Namespace, folder: Path) -> tuple[CostRuns, CostProfile]:
    """A replica whose profile has been measured, or read from ``options.profile``."""
    asked = profile_costs.parse(
        [
            *("--output", str(folder / "live.json"), "--rank", str(options.rank), "--adapters", str(options.adapters)),
            *(("--shape", options.shape, "--load-format", "dummy") if options.shape else ()),
            *(("--set", *options.set) if options.set else ()),
        ]
    )
    runs = profile_costs.build(asked, folder)
    if options.profile is not None:
        return runs, CostProfile.load(options.profile)
    began = time.perf_counter()
    profile_costs.measure(asked, runs)
    return runs, profile_costs.profile(asked, runs, time.perf_counter() - began)


class _Live:
    """Times of the tokens of requests as their reports are made."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: dict[str, list[float]] = {}
        self.queueing: dict[str, float | None] = {}
        self.ended: dict[str, tuple[float, str | None]] = {}

    def now(self) -> float:
        return time.perf_counter() - self.start

    def hear(self, report: AnyReport) -> None:
        """What a worker would send: encoded, as it would be."""
        encode_report(report, 1)
        now = self.now()
        for progress in report.sequences if isinstance(report, Progress) else ():
            name = progress.request_id
            self.times.setdefault(name, []).extend([now] * len(progress.token_ids))
            self.queueing.setdefault(name, progress.queue_seconds)
            if progress.finish_reason is not None:
                self.ended[name] = now, progress.error


def engine_records(runs: CostRuns, asked: Workload) -> list[RequestRecord]:
    """Put requests to the engine, each at its time."""
    engine = runs.replica.engine
    by_name = {spec.name: spec for spec in runs.specs}
    live = _Live()
    driver = EngineDriver(engine, runs.replica.handovers, live.hear, time.perf_counter)
    driver.adapters = {spec.content_hash: spec for spec in runs.specs}
    # As a worker does, before the first request and while none is there.
    while runs.replica.warm_up_some():
        pass
    freeze_heap()
    commands = [_command(index, arrival, by_name) for index, arrival in enumerate(asked.arrivals)]
    sent: list[float] = []
    live.start = time.perf_counter()
    while len(live.ended) < len(commands):
        while len(sent) < len(commands) and asked.arrivals[len(sent)].time <= live.now():
            driver.handle(commands[len(sent)])
            sent.append(live.now())
        if driver.is_idle:
            # A load may end sooner than the next request comes.
            left = asked.arrivals[len(sent)].time - live.now() if len(sent) < len(commands) else None
            loading = [runs.replica.fileno()] if engine.waits_for_load else []
            select.select(loading, [], [], None if left is None else max(0.0, left))
            if not loading:
                continue
        driver.step(report=False)
    return [_record(index, arrival, sent[index], live) for index, arrival in enumerate(asked.arrivals)]


def _command(index: int, arrival: Arrival, by_name: dict[str, object]) -> AddRequest:
    rng = random.Random(index)
    spec = None if arrival.adapter is None else by_name[arrival.adapter]
    return AddRequest(
        request_id=f"live{index}",
        prompt_token_ids=[rng.randrange(1000, 2000) for _ in range(arrival.prompt_tokens)],
        params=SamplingParams(temperature=1.0, max_tokens=arrival.output_tokens, ignore_eos=True),
        seed=index,
        content_hash=getattr(spec, "content_hash", None),
    )


def _record(index: int, arrival: Arrival, sent: float, live: _Live) -> RequestRecord:
    times = live.times.get(f"live{index}", [])
    finished, error = live.ended[f"live{index}"]
    return RequestRecord(
        index=index,
        adapter=arrival.adapter,
        scheduled=arrival.time,
        # An engine is told of a request between two steps: it waits from when it was due.
        sent=min(sent, arrival.time),
        first_token=times[0] if times else None,
        finished=finished,
        prompt_tokens=arrival.prompt_tokens,
        output_tokens=len(times),
        itl=tuple(b - a for a, b in itertools.pairwise(times)),
        queueing=live.queueing.get(f"live{index}"),
        error=error,
    )
