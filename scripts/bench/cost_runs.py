"""Runs of a real engine that show what its steps, switches, loads and moves of KV take."""

from __future__ import annotations

import random
import select
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peft_dist.core.cost_model import CostModel, StepFeatures, SwitchKind
from peft_dist.core.messages import AddRequest, AnyReport, encode_report
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.engine.driver import EngineDriver

KV_SIZES = (4, 16, 64, 128)


@dataclass
class Measured:
    """Everything that was seen. Seconds.

    Attributes:
        steps: Features; what the step took; from the end of the one before it to its own, None for the first.
        others: By kind ("merge", "unmerge", "load", "transfer"): size and seconds.
        contexts: Of one kind of decode step: tokens in the KV cache, of all sequences together; seconds as of a step.
    """

    steps: list[tuple[StepFeatures, float, float | None]] = field(default_factory=list)
    others: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    contexts: list[tuple[int, float, float | None]] = field(default_factory=list)


class Recorder(CostModel):
    """A cost model that also keeps what it is told."""

    def __init__(self, measured: Measured) -> None:
        super().__init__()
        self.measured = measured
        self._last: float | None = None

    def pause(self) -> None:
        """The next step does not follow on the one before it."""
        self._last = None

    def observe_step(self, features: StepFeatures, seconds: float) -> None:
        super().observe_step(features, seconds)
        now = time.perf_counter()
        self.measured.steps.append((features, seconds, None if self._last is None else now - self._last))
        self._last = now

    def observe_switch(self, kind: SwitchKind, seconds: float, rank_rows: int = 0) -> None:
        super().observe_switch(kind, seconds, rank_rows)
        self.measured.others.setdefault(kind, []).append((0, seconds))
        self.pause()

    def observe_load(self, num_bytes: int, seconds: float) -> None:
        super().observe_load(num_bytes, seconds)
        self.measured.others.setdefault("load", []).append((num_bytes, seconds))
        self.pause()


class CostRuns:
    """Drives one replica through batches, as a worker does but for the socket."""

    def __init__(self, replica: Any, specs: Sequence[Any]) -> None:
        self.replica = replica
        self.specs = specs
        self.measured = Measured()
        self._recorder = Recorder(self.measured)
        self._number = 0
        # Every engine that follows goes on with the cost model of the one before it.
        replica.engine.cost = self._recorder

    def use(self, **changes: Any) -> None:
        """Go on with an engine of other options."""
        self.replica.restart(replace(self.replica.config, **changes))

    def batch(self, adapters: Sequence[int | None], prompt: int, output: int) -> None:
        """Requests for these adapters (None: the base), all at once, to their end."""
        sent: list[bytes] = []

        def send(report: AnyReport) -> None:
            sent.append(encode_report(report, 1))

        engine = self.replica.engine
        driver = EngineDriver(engine, self.replica.handovers, send, time.perf_counter)
        driver.adapters = {spec.content_hash: spec for spec in self.specs}
        for index in adapters:
            self._number += 1
            rng = random.Random(self._number)
            # As `peft-dist bench` asks: sampling takes longer than the largest logit does.
            params = SamplingParams(temperature=1.0, max_tokens=output, ignore_eos=True)
            hashed = None if index is None else self.specs[index].content_hash
            prompt_ids = [rng.randrange(1000, 2000) for _ in range(prompt)]
            driver.handle(AddRequest(request_id=f"r{self._number}", prompt_token_ids=prompt_ids, params=params,
                                     seed=1, content_hash=hashed))  # fmt: skip
        self._recorder.pause()
        while engine.has_work:
            if engine.waits_for_load:
                select.select([self.replica.fileno()], [], [])
                self._recorder.pause()
            driver.step(report=False)

    def repeated(self, adapters: Sequence[int | None], prompt: int, output: int, rounds: int) -> None:
        """As ``batch``, so many times after a first one that is not measured: kernels are chosen, and compiled, when
        sizes are met for the first time."""
        before = len(self.measured.steps)
        self.batch(adapters, prompt, output)
        del self.measured.steps[before:]
        for _ in range(rounds):
            self.batch(adapters, prompt, output)

    def decodes(self, sizes: Sequence[int], prompt: int, output: int, counts: Sequence[int], rounds: int) -> None:
        """Unmerged batches of each size, for so many distinct adapters (0: the base)."""
        self.use(policy="fcfs")
        self.batch([0, *range(len(self.specs))], 16, 2)
        self.batch([None] * sizes[-1], prompt, 3)
        # The first of everything is slower.
        self.measured.steps.clear()
        for size in sizes:
            for count in sorted({min(count, size, len(self.specs)) for count in counts}):
                self.repeated([i % count if count else None for i in range(size)], prompt, output, rounds)

    def contexts(self, size: int, lengths: Sequence[int], output: int, rounds: int) -> None:
        """Unmerged decodes of the base behind prompts of each length. Steps are not kept as others are."""
        self.use(policy="fcfs")
        before = len(self.measured.steps)
        for length in lengths:
            self.repeated([None] * size, length, output, rounds)
            own = [step for step in self.measured.steps[before:] if step[0] == StepFeatures(False, size)]
            del self.measured.steps[before:]
            # From one round to the next: the n-th step of each has the same tokens in the cache.
            count = len(own) // rounds
            self.measured.contexts += [
                (size * (length + number % count), seconds, between) for number, (_, seconds, between) in enumerate(own)
            ]

    def prefills(self, lengths: Sequence[int], rounds: int) -> None:
        """Prompts of each length alone, of the base and of an adapter."""
        for length in lengths:
            for adapter in (None, 0):
                self.repeated([adapter], length, 2, rounds)

    def merged(self, sizes: Sequence[int], prompt: int, output: int, switches: int, rounds: int) -> None:
        """Switches to each adapter in turn and back to the base, and merged batches of each size.

        Steps between switches are not kept: what they take is not theirs alone.
        """
        self.use(policy="merge")
        steps = len(self.measured.steps)
        self.batch([0], 16, 2)
        before = {name: len(found) for name, found in self.measured.others.items()}
        for number in range(switches):
            self.batch([1 + number % (len(self.specs) - 1)], 16, 2)
            self.batch([None], 16, 2)
        for name in ("merge", "unmerge"):
            del self.measured.others.get(name, [])[: before.get(name, 0)]
        del self.measured.steps[steps:]
        for size in sizes:
            self.repeated([0] * size, prompt, output, rounds)

    def loads(self, number: int) -> None:
        """Adapters that have to make room for each other; the first round reads them from disk. Steps are not kept."""
        self.use(policy="fcfs", max_loras=1)
        steps = len(self.measured.steps)
        for _ in range(2):
            self.measured.others.pop("load", None)
            for index in range(number):
                self.batch([index % len(self.specs)], 16, 2)
        del self.measured.steps[steps:]

    def transfers(self, rounds: int = 3) -> None:
        """KV blocks out of the pool and into other blocks of it; nothing runs meanwhile."""
        executor, info = self.replica.executor, self.replica.model_info
        for size in KV_SIZES:
            if 2 * size > info.num_blocks:
                break
            for round_number in range(rounds + 1):
                blocks = list(range(2 * size))
                executor.start_export(-100, blocks[:size], on_host=False)
                out = self._copied()
                executor.start_import(-101, out.kv, blocks[size:])
                into = self._copied()
                executor.end_export(-100)
                if round_number:
                    found = self.measured.others.setdefault("transfer", [])
                    found.append((size * info.block_bytes, out.seconds + into.seconds))

    def host_seconds(self) -> float:
        """What scheduling and reporting add to a step, if none is in flight: the median."""
        gaps = [between - seconds for _, seconds, between in self.measured.steps if between is not None]
        return max(0.0, statistics.median(gaps)) if gaps else 0.0

    def _copied(self) -> Any:
        executor = self.replica.executor
        while True:
            select.select([executor.transfers_fileno()], [], [])
            for outcome in executor.take_transfers():
                if outcome.error is not None:
                    raise RuntimeError(f"moving KV failed: {outcome.error}")
                return outcome
