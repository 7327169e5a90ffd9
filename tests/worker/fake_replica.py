"""A replica without a model, for tests of the processes around it. Imported by worker processes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import EngineConfig, ModelInfo
from peft_dist.core.errors import AdapterError, ConfigError
from peft_dist.core.handover import SequenceState
from peft_dist.core.messages import Exported, Imported, ReplicaDetail, ReplicaStats, SequenceProgress
from peft_dist.core.request import Request

# First prompt tokens that make a request special.
HOLD, FAIL, CRASH, REFUSE, SLOW = 1, 2, 3, 4, 9
SLOW_STEP = 0.005
VOCAB_SIZE = 1000
NUM_BLOCKS = 64
MAX_PINS = 1


def expected_token(seed: int, index: int, draw: int, content_hash: str) -> int:
    """What the fake engine draws."""
    return hash((seed, index, draw, int(content_hash or "0", 16))) % VOCAB_SIZE


class FakeEngine:
    """Each request gets one token a step; HOLD requests get one token and then wait to be aborted.

    A step with SLOW requests takes ``SLOW_STEP`` seconds.
    """

    waits_for_load = False
    on_start: Callable[[list[str]], None] | None = None

    def __init__(self) -> None:
        self.residency_version = 0
        self.requests: dict[str, Request] = {}
        self.adapters: dict[str, AdapterSpec] = {}
        self.pins: dict[str, str] = {}
        self.prefetched: list[str] = []

    @property
    def has_work(self) -> bool:
        return any(self._runs(request) for request in self.requests.values())

    def add_request(self, request: Request) -> None:
        if request.prompt_token_ids[0] == REFUSE:
            raise ValueError("refused by the fake")
        assert request.adapter is None or request.adapter.content_hash in self.adapters
        self.requests[request.request_id] = request

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.requests.pop(request_id, None)

    def step(self, now: float) -> list[SequenceProgress]:
        running = [request for request in self.requests.values() if self._runs(request)]
        new = [request.request_id for request in running if request.first_scheduled is None]
        for request in running:
            request.first_scheduled = now
        if new and self.on_start is not None:
            self.on_start(new)
        if any(request.prompt_token_ids[0] == SLOW for request in running):
            time.sleep(SLOW_STEP)
        return [self._advance(request) for request in running]

    def register_adapter(self, spec: AdapterSpec) -> None:
        self.adapters[spec.content_hash] = spec
        self.residency_version += 1

    def pin_adapter(self, name: str, content_hash: str | None) -> None:
        self.pins.pop(name, None)
        if content_hash is not None:
            assert content_hash in self.adapters
            self.pins[name] = content_hash

    def prefetch_adapter(self, content_hash: str) -> None:
        assert content_hash in self.adapters
        self.prefetched.append(content_hash)

    def forget_adapter(self, content_hash: str) -> None:
        assert content_hash not in self.pins.values(), "dropped while pinned"
        assert all(r.content_hash != content_hash for r in self.requests.values()), "dropped while in use"
        del self.adapters[content_hash]
        self.residency_version += 1

    def stats(self) -> ReplicaStats:
        return ReplicaStats(
            num_running=len(self.requests),
            num_blocks=NUM_BLOCKS,
            num_free_blocks=NUM_BLOCKS - len(self.requests),
            resident_adapters=sorted(self.adapters),
        )

    def detail(self) -> ReplicaDetail:
        return ReplicaDetail(running={"": len(self.requests)})

    def _runs(self, request: Request) -> bool:
        return request.prompt_token_ids[0] != HOLD or not request.output_token_ids

    def _advance(self, request: Request) -> SequenceProgress:
        kind = request.prompt_token_ids[0]
        if kind == CRASH:
            raise RuntimeError("the fake crashed")
        if kind == FAIL:
            return self._end(request, [], "error", error="logits were not finite")
        draw = len(request.output_token_ids)
        token = expected_token(request.seed, request.sequence_index, draw, request.content_hash)
        request.output_token_ids.append(token)
        if len(request.output_token_ids) >= request.max_output_tokens:
            return self._end(request, [token], "length")
        return SequenceProgress(request_id=request.request_id, token_ids=[token], first_index=draw)

    def _end(self, request: Request, tokens: list[int], reason: str, error: str | None = None) -> SequenceProgress:
        del self.requests[request.request_id]
        first = len(request.output_token_ids) - len(tokens)
        return SequenceProgress(
            request_id=request.request_id, token_ids=tokens, first_index=first, finish_reason=reason, error=error
        )


class FakeHandovers:
    """Requests of a ``FakeEngine`` go and come at once; what is exported is held."""

    is_due = False

    def __init__(self, engine: FakeEngine, fd: int) -> None:
        self._engine = engine
        self._fd = fd
        self._exports: dict[int, dict[str, Request]] = {}
        self._reports: list[Exported | Imported] = []

    def fileno(self) -> int:
        return self._fd

    def export(self, handover: int, request_ids: Iterable[str]) -> None:
        requests = self._engine.requests
        held = self._exports[handover] = {i: requests.pop(i) for i in request_ids if i in requests}
        states = [SequenceState(i, len(r.output_token_ids), r.num_known_tokens - 1) for i, r in held.items()]
        self._reports.append(Exported(handover=handover, sequences=states))

    def end_export(self, handover: int, *, moved: bool) -> None:
        held = self._exports.pop(handover, {})
        self._engine.requests.update({} if moved else held)

    def import_requests(self, handover: int, requests: Sequence[Request], states: Sequence[SequenceState]) -> None:
        for request in requests:
            self._engine.add_request(request)
        self._reports.append(Imported(handover=handover))

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            for held in self._exports.values():
                held.pop(request_id, None)

    def clear(self) -> None:
        self._exports.clear()

    def poll(self) -> list[Exported | Imported]:
        reports, self._reports = self._reports, []
        return reports


class FakeReplica:
    load_timeout: float | None = None

    def __init__(self, config: EngineConfig) -> None:
        self.engine = FakeEngine()
        self._never_readable = os.pipe()
        self.handovers = FakeHandovers(self.engine, os.pipe()[0])
        self.model_info = fake_model(config.model, name=config.served_model_name)

    def inspect_adapter(self, name: str, path: Path, *, allow_pickle: bool) -> AdapterSpec:
        text = (Path(path) / "adapter_config.json").read_text()
        if "bad" in text:
            raise AdapterError(f"adapter {name!r} is bad: make it good")
        if "explode" in text:
            raise MemoryError("no room")
        content_hash = hashlib.sha256(text.encode()).hexdigest()[:8]
        return AdapterSpec(name=name, content_hash=content_hash, path=str(path), ranks={"q": 8}, num_bytes=len(text))

    def register_adapter(self, spec: AdapterSpec, *, allow_pickle: bool, pinned: bool) -> None:
        others = {content for name, content in self.engine.pins.items() if name != spec.name}
        if pinned and len(others | {spec.content_hash}) > MAX_PINS:
            raise AdapterError(f"adapter {spec.name!r} cannot be pinned: unpin one")
        self.engine.register_adapter(spec)
        self.engine.pin_adapter(spec.name, spec.content_hash if pinned else None)

    def check_device(self) -> None:
        """It has none."""

    def use_transport(self, transport: object) -> None:
        """It moves requests without any KV."""

    def warm_up_some(self) -> bool:
        return False

    def lacks_warm_up(self) -> bool:
        return False

    def fileno(self) -> int:
        return self._never_readable[0]

    def close(self) -> None:
        self.engine.requests.clear()


def fake_model(model: str = "fake", max_model_len: int = 500, name: str | None = None) -> ModelInfo:
    return ModelInfo(
        model=model,
        served_model_name=name or model.rsplit("/", 1)[-1],
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(0,),
        num_blocks=NUM_BLOCKS,
        num_host_blocks=0,
        block_size=16,
        block_bytes=1024,
        device="cpu",
        dtype="float32",
        depth=0,
        attention_backend="fake",
        lora_backend="fake",
    )


def build(config: EngineConfig) -> FakeReplica:
    return FakeReplica(config)


def build_failing(config: EngineConfig) -> FakeReplica:
    raise ConfigError(f"model {config.model!r} cannot be loaded: choose another")


def build_unless_broken(config: EngineConfig) -> FakeReplica:
    """Fails while there is the file that the environment names."""
    if Path(os.environ["FAKE_BROKEN"]).exists():
        raise ConfigError("the fake is broken: mend it")
    return FakeReplica(config)


def build_when_told(config: EngineConfig) -> FakeReplica:
    """Takes as long as nobody writes to the named pipe that the environment names."""
    Path(os.environ["FAKE_GATE"]).read_bytes()
    return FakeReplica(config)


def build_hanging(config: EngineConfig) -> FakeReplica:
    threading.Event().wait()
    raise AssertionError("unreachable")


def build_stuck(config: EngineConfig) -> FakeReplica:
    """Says so on its standard output, and never returns from a call into the system: no handler in Python ever runs."""
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    print("stuck", flush=True)
    lock(mutex)
    raise AssertionError("unreachable")


def build_long(config: EngineConfig) -> FakeReplica:
    """Draws more tokens than a connection holds that nobody reads."""
    replica = FakeReplica(config)
    replica.model_info = replace(replica.model_info, max_model_len=20_000, num_blocks=10_000)
    return replica
