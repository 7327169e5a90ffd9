"""A replica whose engine draws known tokens at a set rate. Runs in a real worker process; see bench_capacity.py."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import msgspec

from peft_dist.core.config import EngineConfig
from peft_dist.core.messages import SequenceProgress
from peft_dist.core.request import Request
from tests.worker.fake_replica import FakeEngine, FakeReplica

PLAN = "PEFT_DIST_CAPACITY_PLAN"
# Between the last request and the first step: what arriving costs the server is measured nowhere here.
_PAUSE = 0.5
_MAX_MODEL_LEN = 100_000


class Plan(msgspec.Struct, frozen=True):
    """What the engine is to do; the server passes only its environment on.

    Attributes:
        tokenizer: Folder of the tokenizer that the tokens are of; ``vocab_size`` is its size.
        tokens: What every stream draws, from ``starts[seed]`` on and round again; its requests name their seed.
        num_streams: Steps begin when so many requests are there.
        rate: Tokens a second, over all streams.
        log: File for a ``StepLog``, written when the last stream has ended.
    """

    tokenizer: str
    vocab_size: int
    tokens: list[int]
    starts: list[int]
    num_streams: int
    rate: float
    log: str

    def drawn(self, seed: int, count: int) -> list[int]:
        """The first tokens of a stream."""
        return [self.tokens[(self.starts[seed] + k) % len(self.tokens)] for k in range(count)]


class StepLog(msgspec.Struct):
    """``sent``: When each step's tokens went out, in seconds of the system's monotonic clock, which processes share.

    ``cpu_seconds`` are this process's between the first step and the last.
    """

    sent: list[float] = []
    cpu_seconds: float = 0.0


class PacedEngine(FakeEngine):
    """One token of every stream in each step. A step that is late is followed at once by the next."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self._plan = plan
        self._log = StepLog()
        self._begin: float | None = None
        self._cpu = 0.0

    @property
    def has_work(self) -> bool:
        return self._begin is not None and bool(self.requests)

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        if len(self.requests) == self._plan.num_streams:
            self._begin = time.monotonic() + _PAUSE
            self._cpu = time.process_time()

    def step(self, now: float) -> list[SequenceProgress]:
        assert self._begin is not None
        due = self._begin + len(self._log.sent) * self._plan.num_streams / self._plan.rate
        time.sleep(max(due - now, 0.0))
        self._mark_started(now)
        drawn = [self._draw(request) for request in list(self.requests.values())]
        self._log.sent.append(time.monotonic())
        if not self.requests:
            self._log.cpu_seconds = time.process_time() - self._cpu
            Path(self._plan.log).write_bytes(msgspec.json.encode(self._log))
        return drawn

    def _mark_started(self, now: float) -> None:
        new = [request for request in self.requests.values() if request.first_scheduled is None]
        for request in new:
            request.first_scheduled = now
        if new and self.on_start is not None:
            self.on_start([request.request_id for request in new])

    def _draw(self, request: Request) -> SequenceProgress:
        plan, output = self._plan, request.output_token_ids
        k = len(output)
        token = plan.tokens[(plan.starts[request.seed] + k) % len(plan.tokens)]
        output.append(token)
        ends = k + 1 == request.max_output_tokens
        if ends:
            del self.requests[request.request_id]
        return SequenceProgress(
            request.request_id,
            [token],
            k,
            finish_reason="length" if ends else None,
            queue_seconds=request.queue_seconds,
        )


class PacedReplica(FakeReplica):
    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        plan = msgspec.json.decode(Path(os.environ[PLAN]).read_bytes(), type=Plan)
        self.engine = PacedEngine(plan)
        self.model_info = replace(
            self.model_info,
            tokenizer=plan.tokenizer,
            vocab_size=plan.vocab_size,
            max_model_len=_MAX_MODEL_LEN,
            num_blocks=_MAX_MODEL_LEN,
        )


def build(config: EngineConfig) -> PacedReplica:
    return PacedReplica(config)
