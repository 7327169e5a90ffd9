"""Drives a replica as a worker does, without sockets: requests go in at any time, steps come out."""

from __future__ import annotations

import select
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu_engine import engine_options
from bench.gpu_workload import write_base


def start_replica(options: Namespace, ranks: list[int], **more: Any) -> Any:
    """A replica of the random model with room for adapters of ``ranks``, and no adapter yet."""
    from peft_dist.core.config import EngineConfig
    from peft_dist.runner.replica import build_replica

    base = write_base(options.shape, options.folder)
    return build_replica(EngineConfig(str(base), **engine_options(options, ranks, **more)))


def register(replica: Any, paths: dict[str, Path], started: Callable[[str], None] = lambda what: None) -> list[Any]:
    """Have requests be able to name these adapters, and steps captured; their specs, in order.

    ``started`` hears what is there: "adapters", then "steps".
    """
    specs = [replica.load_adapter(name, path) for name, path in paths.items()]
    started("adapters")
    replica.warm_up()
    # As a server does while no request is there.
    while replica.warm_up_some():
        pass
    from peft_dist.core.collector import freeze_heap

    # As a worker does: else a full collection stops the steps for a third of a second now and then.
    freeze_heap()
    started("steps")
    return specs


class Round(NamedTuple):
    """One call of the engine: when it began, seconds, what it submitted (None: nothing), steps captured meanwhile."""

    began: float
    seconds: float
    decision: Any
    captured: int


class Driver:
    """One replica's requests.

    Attributes:
        rounds: Every call of the engine, where they are kept.
        loads: What came of every load, where rounds are kept.
        arrived: When each request that was submitted arrived, until it ends; the same clock as ``first_token``.
        first_token: When a request's first token came.
        errors: Of requests that failed.
        tokens: Drawn so far by all.
        finished, aborted: How many have ended by themselves, and not.
    """

    def __init__(self, replica: Any, *, keeps_rounds: bool = False) -> None:
        self.replica = replica
        self.rounds: list[Round] | None = [] if keeps_rounds else None
        self._decisions: list[Any] = []
        self.loads: list[Any] = []
        if keeps_rounds:
            replica.engine.on_decision = self._decisions.append
            executor = replica.engine.executor
            executor.take_loaded = partial(self._noted, executor.take_loaded)
        self.arrived: dict[str, float] = {}
        self.first_token: dict[str, float] = {}
        self.errors: list[str] = []
        self.tokens = self.finished = self.aborted = 0
        self._ids = count()

    def submit(self, spec: Any, prompt: list[int], params: Any, arrival: float | None = None) -> str:
        from peft_dist.core.request import Request

        now = time.perf_counter() if arrival is None else arrival
        request_id = f"r{next(self._ids)}"
        self.replica.engine.add_request(Request(request_id, prompt, params, 0, now, spec))
        self.arrived[request_id] = now
        return request_id

    def abort(self, request_id: str) -> None:
        self.replica.engine.abort([request_id])
        del self.arrived[request_id]
        self.aborted += 1

    def step(self, until: float | None = None) -> None:
        """One step, or where only a load (or time, up to ``until``) can help, a wait for it."""
        engine = self.replica.engine
        if not engine.has_work or engine.waits_for_load:
            timeout = None if until is None else max(0.0, until - time.perf_counter())
            select.select([self.replica.fileno()], [], [], timeout)
        for progress in self._round() if engine.has_work else ():
            self.tokens += len(progress.token_ids)
            if progress.request_id not in self.arrived:
                continue
            if progress.token_ids:
                self.first_token.setdefault(progress.request_id, time.perf_counter())
            if progress.error:
                self.errors.append(progress.error)
            if progress.finish_reason:
                del self.arrived[progress.request_id]
                self.finished += 1

    def _round(self) -> list[Any]:
        began = time.perf_counter()
        awaited = self._num_awaited
        progress: list[Any] = self.replica.engine.step(began)
        if self.rounds is not None:
            decision = self._decisions.pop() if self._decisions else None
            seconds = time.perf_counter() - began
            self.rounds.append(Round(began, seconds, decision, self._num_awaited - awaited))
        return progress

    def _noted(self, take_loaded: Callable[[], list[Any]]) -> list[Any]:
        outcomes = take_loaded()
        self.loads += outcomes
        return outcomes

    @property
    def _num_awaited(self) -> int:
        graphs = self.replica.runner.graphs
        return 0 if graphs is None else graphs.num_awaited

    def drain(self) -> None:
        while self.replica.engine.has_work:
            self.step()
