"""Everything that enters an engine from outside, in order: enough to have another one decide the same again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.batch import Batch, StepResult
from peft_dist.core.config import EngineConfig, ModelInfo
from peft_dist.core.handover import KVHandle, SequenceState
from peft_dist.core.messages import Exported, Imported, SequenceProgress
from peft_dist.core.record_file import End, RecordEntry, Recorder
from peft_dist.core.request import Request
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.engine.engine import Engine
from peft_dist.engine.executor import Executor, LoadOutcome, TransferOutcome

FORMAT = 2


class Begin(RecordEntry, frozen=True):
    """A new engine. ``cost`` is the state of its cost model; ``page_rows`` and ``num_rows`` are as of ``assemble``."""

    format: int
    config: EngineConfig
    info: ModelInfo
    cost: dict[str, Any]
    page_rows: int
    num_rows: int | None


class Add(RecordEntry, frozen=True):
    """A request came; its adapter is registered."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    arrival_time: float
    content_hash: str | None
    sequence_index: int
    output_token_ids: list[int]

    @classmethod
    def of(cls, request: Request) -> Add:
        params = (request.request_id, request.prompt_token_ids, request.params, request.seed, request.arrival_time)
        hashed = None if request.adapter is None else request.content_hash
        return cls(*params, hashed, request.sequence_index, list(request.output_token_ids))


class Abort(RecordEntry, frozen=True):
    request_ids: list[str]


class Register(RecordEntry, frozen=True):
    spec: AdapterSpec
    pinned: bool


class Pin(RecordEntry, frozen=True):
    name: str
    content_hash: str | None


class Prefetch(RecordEntry, frozen=True):
    content_hash: str


class Forget(RecordEntry, frozen=True):
    content_hash: str


class Step(RecordEntry, frozen=True):
    now: float


class Moves(RecordEntry, frozen=True):
    """Requests may move from here on; ``ahead_blocks`` is as of ``Handovers``."""

    ahead_blocks: int


class Export(RecordEntry, frozen=True):
    """Requests are to move away with their KV: as of ``Handovers``, and so are the next ones."""

    handover: int
    request_ids: list[str]


class EndExport(RecordEntry, frozen=True):
    handover: int
    moved: bool


class Import(RecordEntry, frozen=True):
    """What a move brings. Where its KV lay says nothing of what is decided."""

    handover: int
    requests: list[Add]
    states: list[SequenceState]


class AbortMoves(RecordEntry, frozen=True):
    request_ids: list[str]


class ClearMoves(RecordEntry, frozen=True):
    pass


class Poll(RecordEntry, frozen=True):
    """Moves under way are carried on."""


class Copied(RecordEntry, frozen=True):
    """How a copy of KV ended."""

    outcome: TransferOutcome


class Copying(RecordEntry, frozen=True):
    """The decision to copy these blocks, ``way`` "out" or "in"; or to hold a copy no longer, "end"."""

    way: str
    key: int
    blocks: list[int]


class Told(RecordEntry, frozen=True):
    """Moves that were told to have come so far, and the error of each."""

    moves: list[tuple[str, int, str | None]]

    @classmethod
    def of(cls, reports: Iterable[Exported | Imported]) -> Told:
        return cls([(type(one).__name__, one.handover, one.error) for one in reports])


class Known(RecordEntry, frozen=True):
    """The executor answers a question about an adapter in another way than before."""

    question: str
    content_hash: str
    answer: bool


class Switched(RecordEntry, frozen=True):
    target: str | None
    seconds: float | None
    error: str | None = None


class Loaded(RecordEntry, frozen=True):
    """What the ``call``-th question for loads since the last input brought."""

    call: int
    outcomes: list[LoadOutcome]


class Submitted(RecordEntry, frozen=True):
    """The decision: (request, first position, tokens, whether it draws) of each sequence, and all that goes with it."""

    step: int
    sequences: list[tuple[str, int, int, bool]]
    merged_adapter: str | None
    swap_outs: list[tuple[int, int]]
    swap_ins: list[tuple[int, int]]

    @classmethod
    def of(cls, batch: Batch) -> Submitted:
        rows = [(s.request_id, s.start, s.num_tokens, s.samples) for s in batch.sequences]
        return cls(batch.step, rows, batch.merged_adapter, list(batch.swap_outs), list(batch.swap_ins))


class Collected(RecordEntry, frozen=True):
    result: StepResult


Moving = Moves | Export | EndExport | Import | AbortMoves | ClearMoves | Poll
Input = Add | Abort | Register | Pin | Prefetch | Forget | Step | Moving
Entry = Begin | Input | Known | Switched | Loaded | Submitted | Collected | Copied | Copying | Told | End
QUESTIONS = ("can_merge", "can_host", "holds_merged")


class RecordedEngine(Engine):
    """An engine whose inputs are noted before they are obeyed."""

    def __init__(self, recorder: Recorder, *args: Any) -> None:
        self.recorder = recorder
        self._depth_of_calls = 0
        super().__init__(*args)

    def add_request(self, request: Request) -> None:
        self.noted(Add.of(request), lambda: super(RecordedEngine, self).add_request(request))

    def abort(self, request_ids: Iterable[str]) -> None:
        ids = list(request_ids)
        self.noted(Abort(ids), lambda: super(RecordedEngine, self).abort(ids))

    def register_adapter(self, spec: AdapterSpec, *, pinned: bool = False) -> None:
        register = super().register_adapter
        self.noted(Register(spec, pinned), lambda: register(spec, pinned=pinned))

    def pin_adapter(self, name: str, content_hash: str | None) -> None:
        pin = super().pin_adapter
        self.noted(Pin(name, content_hash), lambda: pin(name, content_hash))

    def prefetch_adapter(self, content_hash: str) -> None:
        prefetch = super().prefetch_adapter
        self.noted(Prefetch(content_hash), lambda: prefetch(content_hash))

    def forget_adapter(self, content_hash: str) -> None:
        forget = super().forget_adapter
        self.noted(Forget(content_hash), lambda: forget(content_hash))

    def step(self, now: float) -> list[SequenceProgress]:
        step = super().step
        return cast(list[SequenceProgress], self.noted(Step(now), lambda: step(now)))

    def noted(self, entry: Input, call: Callable[[], Any]) -> Any:
        """Note what comes from outside, and not what one of these calls makes of it."""
        if not self._depth_of_calls:
            self.recorder.note(entry)
            cast(RecordingExecutor, self.executor).begin_input()
        self._depth_of_calls += 1
        try:
            return call()
        finally:
            self._depth_of_calls -= 1


class RecordingExecutor:
    """An executor whose answers are noted. Those that decide nothing are not."""

    def __init__(self, executor: Executor, recorder: Recorder) -> None:
        self._executor = executor
        self._recorder = recorder
        self._answers: dict[tuple[str, str], bool] = {}
        self._num_asked = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def begin_input(self) -> None:
        """Count the calls that count from here."""
        self._num_asked = 0

    def submit(self, batch: Batch) -> Any:
        self._recorder.note(Submitted.of(batch))
        return self._executor.submit(batch)

    def collect(self, handle: Any) -> StepResult:
        result = self._executor.collect(handle)
        self._recorder.note(Collected(result))
        return result

    def can_merge(self, spec: AdapterSpec) -> bool:
        return self._answer("can_merge", spec.content_hash, self._executor.can_merge(spec))

    def can_host(self, spec: AdapterSpec) -> bool:
        return self._answer("can_host", spec.content_hash, self._executor.can_host(spec))

    def holds_merged(self, content_hash: str) -> bool:
        return self._answer("holds_merged", content_hash, self._executor.holds_merged(content_hash))

    def switch(self, spec: AdapterSpec | None) -> float | None:
        target = None if spec is None else spec.content_hash
        try:
            seconds = self._executor.switch(spec)
        except Exception as error:
            self._recorder.note(Switched(target, None, str(error)))
            raise
        self._recorder.note(Switched(target, seconds))
        return seconds

    def take_loaded(self) -> list[LoadOutcome]:
        outcomes = self._executor.take_loaded()
        if outcomes:
            self._recorder.note(Loaded(self._num_asked, outcomes))
        self._num_asked += 1
        return outcomes

    def start_export(self, key: int, blocks: Sequence[int], *, on_host: bool, ahead: bool = False) -> None:
        self._recorder.note(Copying("out", key, list(blocks)))
        self._executor.start_export(key, blocks, on_host=on_host, ahead=ahead)

    def start_import(self, key: int, kv: KVHandle, blocks: Sequence[int]) -> None:
        self._recorder.note(Copying("in", key, list(blocks)))
        self._executor.start_import(key, kv, blocks)

    def end_export(self, key: int) -> None:
        self._recorder.note(Copying("end", key, []))
        self._executor.end_export(key)

    def _answer(self, question: str, content_hash: str, answer: bool) -> bool:
        if self._answers.get((question, content_hash)) != answer:
            self._answers[question, content_hash] = answer
            self._recorder.note(Known(question, content_hash, answer))
        return answer
