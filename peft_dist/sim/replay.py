"""A recorded engine again: another one is told the same, in virtual time, and must decide the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast, get_args

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.batch import Batch, StepResult
from peft_dist.core.cost_model import CostModel
from peft_dist.core.errors import ConfigError, PeftDistError
from peft_dist.core.handover import KVHandle
from peft_dist.core.messages import AdapterResidency
from peft_dist.core.record_file import End
from peft_dist.core.request import Request
from peft_dist.engine.assembly import assemble
from peft_dist.engine.engine import Engine
from peft_dist.engine.executor import LoadOutcome, TransferOutcome
from peft_dist.engine.handovers import Handovers
from peft_dist.engine.recording import (
    FORMAT,
    Abort,
    AbortMoves,
    Add,
    Begin,
    ClearMoves,
    Collected,
    Copied,
    Copying,
    EndExport,
    Entry,
    Export,
    Forget,
    Import,
    Input,
    Known,
    Loaded,
    Moves,
    Moving,
    Pin,
    Poll,
    Prefetch,
    Register,
    Step,
    Submitted,
    Switched,
    Told,
)
from peft_dist.sim.recordings import read_lines

E = TypeVar("E")
_INPUTS = get_args(Input)
_MOVING = get_args(Moving)


class ReplayError(PeftDistError):
    """The replay decided otherwise than the recording; says where."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What was replayed: engines, steps submitted, switches, moves of requests with their KV that came to an end, and
    why the recording ends before the engine did."""

    engines: int
    steps: int
    switches: int
    moves: int
    ended: str | None


def read(path: Path) -> Iterator[Entry]:
    """Entries of a recording. One that is cut off in a line ends with ``End``. Raises ConfigError."""
    yield from read_lines(path, Entry, lambda why: End(why))


def replay(entries: Iterable[Entry]) -> Replayed:
    """Have engines decide again, with the recorded durations, loads and draws.

    Raises:
        ReplayError: a decision, or what was asked of the executor, differs.
        ConfigError: the recording is of another format, or ends before the first step.
    """
    engines = switches = steps = moves = 0
    engine, handovers, executor, ended = None, None, ReplayExecutor(), None
    for given, answers in _groups(entries):
        if isinstance(given, End):
            ended = given.why
            break
        if isinstance(given, Begin):
            executor = ReplayExecutor()
            engine, engines = _engine(given, executor), engines + 1
            handovers = Handovers(engine)
            continue
        if engine is None or handovers is None:
            raise ConfigError("the recording does not begin with an engine")
        executor.expect(answers)
        if isinstance(given, Moves):
            handovers = Handovers(engine, given.ahead_blocks)
        elif isinstance(given, _MOVING):
            moves += _tell_of_moves(engine, handovers, executor, given)
        else:
            _tell(engine, given)
        executor.check_done()
        steps += sum(isinstance(answer, Submitted) for answer in answers)
        switches += sum(isinstance(answer, Switched) for answer in answers)
    if not steps:
        raise ConfigError(f"the recording ends before its first step{': ' + ended if ended else ''}")
    return Replayed(engines, steps, switches, moves, ended)


def _groups(entries: Iterable[Entry]) -> Iterator[tuple[Begin | Input | End, list[Entry]]]:
    """Each input with what the executor answered while it was obeyed. The last may lack answers, and is left out."""
    given: Begin | Input | None = None
    answers: list[Entry] = []
    for entry in entries:
        if isinstance(entry, End):
            yield entry, []
            return
        if isinstance(entry, (Begin, *_INPUTS)):
            if given is not None:
                yield given, answers
            given, answers = cast(Begin | Input, entry), []
        else:
            answers.append(entry)


def _engine(begin: Begin, executor: ReplayExecutor) -> Engine:
    if begin.format != FORMAT:
        raise ConfigError(f"a recording of format {begin.format}: this version reads format {FORMAT}")
    cost = CostModel.from_dict(begin.cost)
    return assemble(begin.config, begin.info, executor, cost, page_rows=begin.page_rows, num_rows=begin.num_rows)


def _request(engine: Engine, given: Add) -> Request:
    adapter = None if given.content_hash is None else engine.adapters[given.content_hash]
    known = (given.request_id, given.prompt_token_ids, given.params, given.seed, given.arrival_time, adapter)
    return Request(*known, given.sequence_index, list(given.output_token_ids))


def _tell_of_moves(engine: Engine, handovers: Handovers, executor: ReplayExecutor, given: Moving) -> int:
    """Returns how many moves have come so far as to be told of."""
    match given:
        case Export(handover, request_ids):
            handovers.export(handover, request_ids)
        case EndExport(handover, moved):
            handovers.end_export(handover, moved=moved)
        case Import(handover, requests, states):
            handovers.import_requests(handover, [_request(engine, one) for one in requests], states)
        case AbortMoves(request_ids):
            handovers.abort(request_ids)
        case ClearMoves():
            handovers.clear()
        case Poll():
            told = Told.of(handovers.poll())
            executor.compare(told)
            return len(told.moves)
    return 0


def _tell(engine: Engine, given: Input) -> None:
    match given:
        case Add():
            engine.add_request(_request(engine, given))
        case Abort(request_ids):
            engine.abort(request_ids)
        case Register(spec, pinned):
            engine.register_adapter(spec, pinned=pinned)
        case Pin(name, content_hash):
            engine.pin_adapter(name, content_hash)
        case Prefetch(content_hash):
            engine.prefetch_adapter(content_hash)
        case Forget(content_hash):
            engine.forget_adapter(content_hash)
        case Step(now):
            engine.step(now)


class ReplayExecutor:
    """Answers as the recorded executor did, and compares what it is asked."""

    def __init__(self) -> None:
        self._answers: deque[Entry] = deque()
        self._known: dict[tuple[str, str], bool] = {}
        self._merged: str | None = None
        self._num_asked = 0
        self._last_step = 0

    def expect(self, answers: Iterable[Entry]) -> None:
        """What the recorded executor said during the input that comes next."""
        self._answers = deque(answers)
        self._num_asked = 0

    def check_done(self) -> None:
        """Raises ReplayError when the recorded engine did more."""
        self._learn()
        if self._answers:
            raise ReplayError(f"after step {self._last_step}: recorded is {self._answers[0]}, replayed nothing")

    def submit(self, batch: Batch) -> int:
        mine, recorded = Submitted.of(batch), self._next(Submitted, f"step {batch.step}")
        if mine != recorded:
            raise ReplayError(f"step {batch.step}: recorded is {recorded}, replayed {mine}")
        self._last_step = batch.step
        return batch.step

    def collect(self, handle: int) -> StepResult:
        result = self._next(Collected, f"the result of step {handle}").result
        if result.step != handle:
            raise ReplayError(f"the result of step {result.step} is recorded, replayed is that of {handle}")
        return result

    def can_merge(self, spec: AdapterSpec) -> bool:
        return self._answer("can_merge", spec.content_hash)

    def can_host(self, spec: AdapterSpec) -> bool:
        return self._answer("can_host", spec.content_hash)

    def holds_merged(self, content_hash: str) -> bool:
        return self._answer("holds_merged", content_hash)

    def switch(self, spec: AdapterSpec | None) -> float | None:
        target = None if spec is None else spec.content_hash
        recorded = self._next(Switched, f"a switch to {target}")
        if recorded.target != target:
            raise ReplayError(f"after step {self._last_step}: recorded is {recorded}, replayed a switch to {target}")
        if recorded.error is not None:
            raise RuntimeError(recorded.error)
        self._merged = target
        return recorded.seconds

    def merged_adapter(self) -> str | None:
        return self._merged

    def take_loaded(self) -> list[LoadOutcome]:
        self._learn()
        outcomes: list[LoadOutcome] = []
        if self._answers and isinstance(loaded := self._answers[0], Loaded) and loaded.call == self._num_asked:
            self._answers.popleft()
            outcomes = loaded.outcomes
        self._num_asked += 1
        return outcomes

    def residency(self) -> list[AdapterResidency]:
        return []

    def peak_memory_bytes(self) -> int:
        return 0

    def forget(self, request_ids: Sequence[str]) -> None:
        """Nothing is kept."""

    def start_load(self, spec: AdapterSpec, slot: int) -> None:
        """Its end is recorded."""

    def fileno(self) -> int:
        return -1

    def drop_adapter(self, slot: int) -> None:
        """Nothing is kept."""

    def keep_adapter(self, content_hash: str) -> None:
        """Nothing is kept."""

    def release_adapter(self, content_hash: str) -> None:
        """Nothing is kept."""

    def discard_adapter(self, content_hash: str) -> None:
        """Nothing is kept."""

    def start_export(self, key: int, blocks: Sequence[int], *, on_host: bool, ahead: bool = False) -> None:
        self.compare(Copying("out", key, list(blocks)))

    def start_import(self, key: int, kv: KVHandle, blocks: Sequence[int]) -> None:
        self.compare(Copying("in", key, list(blocks)))

    def take_transfers(self) -> list[TransferOutcome]:
        outcomes = []
        while self._answers and isinstance(copied := self._answers[0], Copied):
            self._answers.popleft()
            outcomes.append(copied.outcome)
        return outcomes

    def end_export(self, key: int) -> None:
        self.compare(Copying("end", key, []))

    def compare(self, mine: Copying | Told) -> None:
        """Raises ReplayError when the recorded engine did otherwise."""
        recorded = self._next(type(mine), str(mine))
        if mine != recorded:
            raise ReplayError(f"after step {self._last_step}: recorded is {recorded}, replayed {mine}")

    def transfers_fileno(self) -> int:
        return -1

    def _learn(self) -> None:
        """Take in the answers that changed before what is next."""
        while self._answers and isinstance(known := self._answers[0], Known):
            self._answers.popleft()
            self._known[known.question, known.content_hash] = known.answer

    def _answer(self, question: str, content_hash: str) -> bool:
        known = self._answers[0] if self._answers else None
        if isinstance(known, Known) and (known.question, known.content_hash) == (question, content_hash):
            self._answers.popleft()
            self._known[question, content_hash] = known.answer
        if (question, content_hash) not in self._known:
            raise ReplayError(f"after step {self._last_step}: {question} of {content_hash} was not asked when recorded")
        return self._known[question, content_hash]

    def _next(self, kind: type[E], what: str) -> E:
        self._learn()
        found = self._answers.popleft() if self._answers else None
        if not isinstance(found, kind):
            raise ReplayError(f"after step {self._last_step}: recorded is {found}, replayed {what}")
        return found
