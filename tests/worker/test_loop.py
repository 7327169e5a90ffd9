"""What the worker's loop reports of itself, and when; on a clock that only waiting moves."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import AdapterError, DeviceLostError, UnfitAdapterError
from peft_dist.core.handover import KVHandle, SequenceState
from peft_dist.core.messages import (
    AbortRequest,
    AdapterResult,
    AddRequest,
    AnyReport,
    EndExport,
    Exported,
    ExportRequests,
    Fence,
    Imported,
    ImportRequests,
    LoadAdapter,
    PrefetchAdapter,
    Progress,
    ReplicaDetail,
    Shutdown,
    UnloadAdapter,
    Warmth,
)
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.engine.detail_schedule import CHANGE_SECONDS
from peft_dist.engine.handovers import Handovers
from peft_dist.worker.idle_work import FIRST_GUESS, QUIET_SECONDS, IdleWork
from peft_dist.worker.loop import WorkerLoop
from tests.engine.test_engine import make_engine

SPEC = AdapterSpec("late", "late", "", {"m": 4}, 10)


class Script:
    """A channel that brings one batch of commands after another, each when the loop would wait without end.

    Where the loop sets itself a time limit, that time passes and nothing comes.
    """

    def __init__(self, *batches: list[Any]) -> None:
        self.batches = deque([*batches, [Shutdown()]])
        self.ready: list[Any] = []
        self.now = 100.0
        self.sent: list[AnyReport] = []
        self.before_wait: Callable[[], bool] = lambda: False

    def watch(self, fd: int) -> None:
        pass

    def wait(self, timeout_ms: int | None = None) -> None:
        if self.before_wait():
            return
        if timeout_ms is None:
            self.ready = self.batches.popleft()
        else:
            self.now += timeout_ms / 1e3

    def receive(self) -> list[Any]:
        ready, self.ready = self.ready, []
        return ready

    def send(self, report: AnyReport) -> None:
        self.sent.append(report)

    def last_detail(self) -> ReplicaDetail:
        return [r.detail for r in self.sent if isinstance(r, Progress) and r.detail is not None][-1]

    def details(self) -> int:
        return sum(isinstance(report, Progress) and report.detail is not None for report in self.sent)


class EngineReplica:
    """A replica around a real engine on a made-up device."""

    load_timeout: float | None = None

    def __init__(self) -> None:
        self.engine = make_engine(num_slots=1)
        self.handovers = Handovers(self.engine)
        self._pipe = os.pipe()
        self.warm_ups: list[bool] = []
        self.device_error: DeviceLostError | None = None

    def inspect_adapter(self, name: str, path: Path, *, allow_pickle: bool) -> AdapterSpec:
        return AdapterSpec(name, name, "", {"m": 4}, 10)

    def register_adapter(self, spec: AdapterSpec, *, allow_pickle: bool, pinned: bool) -> None:
        self.engine.check_room(spec, pinned=pinned)
        self.engine.register_adapter(spec, pinned=pinned)

    def check_device(self) -> None:
        if self.device_error is not None:
            raise self.device_error

    def warm_up_some(self) -> bool:
        self.warm_ups.append(self.engine.has_work)
        return len(self.warm_ups) <= 3

    def lacks_warm_up(self) -> bool:
        return len(self.warm_ups) < 3

    def fileno(self) -> int:
        return self._pipe[0]

    def close(self) -> None:
        for fd in self._pipe:
            os.close(fd)


@pytest.fixture
def replica() -> Iterator[EngineReplica]:
    made = EngineReplica()
    yield made
    made.close()


def run(replica: Any, script: Any) -> WorkerLoop:
    loop = WorkerLoop(replica, script, lambda command: Path(command.path), clock=lambda: script.now)
    loop._driver.adapters = dict(replica.engine.adapters)
    loop.run()
    loop._fetcher.close()
    return loop


def add(name: str, content_hash: str | None, tokens: int = 1) -> AddRequest:
    return AddRequest(
        request_id=name,
        prompt_token_ids=[5, 6, 7],
        params=SamplingParams(max_tokens=tokens, ignore_eos=True),
        seed=1,
        content_hash=content_hash,
    )


def residency(script: Script) -> dict[str, str]:
    return {held.content_hash: held.tier for held in script.last_detail().adapters}


def test_the_end_of_the_last_request_is_told_though_details_were_sent_just_now(replica: EngineReplica) -> None:
    # Each of them comes and goes within one round of the loop, right after the one before.
    script = Script([add("a", "hash0")], [add("b", None)], [add("c", None)])
    run(replica, script)
    assert script.last_detail().num_steps == replica.engine.num_steps == 3
    assert residency(script) == {"hash0": "device"}


def test_a_load_that_ends_and_an_adapter_that_leaves_are_told_while_nothing_runs(replica: EngineReplica) -> None:
    script = Script([add("a", "hash0")], [UnloadAdapter(call_id=1, content_hash="hash0")])
    run(replica, script)
    assert residency(script) == {}
    script = Script([add("b", "hash1")], [add("c", "hash2")])
    run(replica, script)
    assert residency(script) == {"hash2": "device"}, "hash1 had to go for it"
    assert script.last_detail().num_adapter_evictions == 1


def test_a_refusal_says_whether_trying_again_may_help(replica: EngineReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [UnfitAdapterError("q has rank 4"), AdapterError("adapter_config.json is missing"), OSError("gone")]

    def inspect(name: str, path: Path, *, allow_pickle: bool) -> AdapterSpec:
        raise errors[int(name)]

    monkeypatch.setattr(replica, "inspect_adapter", inspect)
    script = Script([LoadAdapter(call_id=i, name=str(i), path="/there") for i in range(3)])

    def results() -> list[AdapterResult]:
        return [report for report in script.sent if isinstance(report, AdapterResult)]

    script.before_wait = lambda: len(results()) < 3 and not script.ready and len(script.batches) == 1
    run(replica, script)
    assert sorted((one.call_id, one.is_final) for one in results()) == [(0, True), (1, False), (2, False)]
    assert all(one.error for one in results())


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_registration_that_fails_is_refused_unless_nothing_works_any_more(
    is_lost: bool, replica: EngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    def register(spec: AdapterSpec, *, allow_pickle: bool, pinned: bool) -> None:
        replica.device_error = DeviceLostError("the device is lost") if is_lost else None
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(replica, "register_adapter", register)
    script = Script([LoadAdapter(call_id=1, name="new", path="/there")])

    def told() -> list[str | None]:
        return [report.error for report in script.sent if isinstance(report, AdapterResult)]

    script.before_wait = lambda: not told() and not script.ready and len(script.batches) == 1
    if is_lost:
        with pytest.raises(DeviceLostError):
            run(replica, script)
        assert not told()
    else:
        run(replica, script)
        assert told() == ["RuntimeError: CUDA error"]


def test_a_registration_is_told_soon_and_many_of_them_together(replica: EngineReplica) -> None:
    script = Script([LoadAdapter(call_id=i, name=f"new{i}", path="/there") for i in range(20)])
    loop = None

    def all_found() -> bool:
        # Real threads look for the adapters: their ends are all that is waited for.
        return len(replica.engine.adapters) < 4 + 20 and not script.ready and len(script.batches) == 1

    script.before_wait = all_found
    loop = run(replica, script)
    assert len(loop._driver.adapters) == 4 + 20
    assert script.now <= 100.0 + 2 * CHANGE_SECONDS
    assert 1 <= script.details() <= 3


def test_while_nothing_changes_nothing_is_told(replica: EngineReplica) -> None:
    script = Script([add("a", None)], [], [], [])
    run(replica, script)
    told = script.details()
    assert script.now <= 100.0 + QUIET_SECONDS + CHANGE_SECONDS and told <= 2


def test_a_replica_warms_up_while_there_is_no_work_and_commands_come_in_between(replica: EngineReplica) -> None:
    script = Script([])
    received: list[int] = []
    receive = script.receive

    def arriving() -> list[Any]:
        received.append(len(replica.warm_ups))
        # A request comes while the replica warms up for the second time.
        return [add("a", None, tokens=2)] if len(received) == 2 else receive()

    script.receive = arriving  # type: ignore[method-assign]
    run(replica, script)
    assert received[:2] == [1, 2] and replica.engine.num_steps == 2
    # Three times there was something to do, and then it is not asked again without a reason.
    assert len(replica.warm_ups) == 4 and not any(replica.warm_ups)
    assert warmth(script) == [True], "nobody takes it to be warm before it says so"


def test_after_a_request_a_replica_warms_up_once_it_was_quiet_for_a_while(
    replica: EngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script([add("a", None)], [add("b", None)], [LoadAdapter(call_id=1, name="new", path="/there")])
    did: list[tuple[float, int, int]] = []

    def warm_up_some() -> bool:
        did.append((script.now, replica.engine.num_steps, len(replica.engine.adapters)))
        return False

    monkeypatch.setattr(replica, "warm_up_some", warm_up_some)
    # Real threads look for the adapter.
    script.before_wait = lambda: len(script.batches) == 1 and not script.ready and len(replica.engine.adapters) == 4
    run(replica, script)
    # Before the first request at once, then behind each one in the first quiet second, and for what came.
    assert did[:3] == [(100.0, 0, 4), (100.0 + QUIET_SECONDS, 1, 4), (100.0 + 2 * QUIET_SECONDS, 2, 4)]
    assert did[-1] == (100.0 + 2 * QUIET_SECONDS, 2, 5) and len(did) <= 5


def warmth(script: Script) -> list[bool]:
    return [report.is_warm for report in script.sent if isinstance(report, Warmth)]


def test_what_a_piece_takes_is_told_once_and_again_when_it_is_another(
    replica: EngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script()
    pieces = [0.25, 0.3, 0.2, 0.9, 0.8]

    def warm_up_some() -> bool:
        script.now += pieces[0] if pieces else 0.0
        return bool(pieces and pieces.pop(0))

    monkeypatch.setattr(replica, "warm_up_some", warm_up_some)
    run(replica, script)
    told = [(report.is_warm, report.pause) for report in script.sent if isinstance(report, Warmth)]
    assert told == [(False, pytest.approx(0.25)), (False, pytest.approx(0.9)), (True, 0.0)]


@pytest.mark.parametrize("brings_work", [True, False])
def test_it_is_no_longer_warm_before_an_adapter_that_brings_work_can_be_asked_for(
    brings_work: bool, replica: EngineReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script([add("a", None)], [LoadAdapter(call_id=1, name="new", path="/there")])
    script.before_wait = lambda: len(script.batches) == 1 and not script.ready and len(replica.engine.adapters) == 4
    left, takes = [1], 0.4

    def warm_up_some() -> bool:
        script.now += takes if left else 0.0
        return bool(left and left.pop())

    monkeypatch.setattr(replica, "warm_up_some", warm_up_some)
    # Registered are four, and the new one.
    monkeypatch.setattr(replica, "lacks_warm_up", lambda: brings_work and len(replica.engine.adapters) == 5)
    run(replica, script)
    told = [(report.is_warm, report.pause) for report in script.sent if isinstance(report, Warmth)]
    piece = pytest.approx(takes)
    again = [(False, piece), (True, 0.0)] if brings_work else []
    assert told == [(False, piece), (True, 0.0), *again], "a request changes nothing"
    if brings_work:
        [number] = [i for i, report in enumerate(script.sent) if isinstance(report, AdapterResult)]
        assert isinstance(script.sent[number - 1], Warmth)


def test_before_a_piece_was_seen_it_is_guessed() -> None:
    told: list[tuple[bool, float]] = []
    work = IdleWork(lambda: False, lambda: True, lambda: 0.0, lambda is_warm, pause: told.append((is_warm, pause)))
    work.expect_more()
    assert told == [(False, FIRST_GUESS)]
    work.tell_anew()
    assert told == [(False, FIRST_GUESS)] * 2


class Interrupted(Script):
    """Commands that come while the engine works: ``during`` says in which round which."""

    def __init__(self, during: dict[int, list[Any]], *batches: list[Any]) -> None:
        super().__init__(*batches)
        self.during = during
        self.rounds = 0

    def receive(self) -> list[Any]:
        self.rounds += 1
        return super().receive() + self.during.pop(self.rounds, [])


def handover_reports(script: Script) -> list[AnyReport]:
    return [report for report in script.sent if isinstance(report, Exported | Imported)]


def test_an_export_begins_though_nothing_else_runs_and_comes_after_the_last_token(replica: EngineReplica) -> None:
    replica.engine.depth = 1
    export = ExportRequests(handover=4, request_ids=["a", "unknown"])
    script = Interrupted({5: [export]}, [add("a", None, 30)], [], [EndExport(handover=4, moved=False)])

    def look() -> bool:
        # The engine has no work once the step in flight is collected, and nobody would wake the loop.
        assert not replica.handovers.is_due, "it waits though a copy can begin"
        return False

    script.before_wait = look
    run(replica, script)
    [exported] = handover_reports(script)
    assert isinstance(exported, Exported) and exported.error is None
    [state] = exported.sequences
    before = script.sent[: script.sent.index(exported)]
    drawn = sum(len(s.token_ids) for report in before if isinstance(report, Progress) for s in report.sequences)
    assert state.num_output_tokens == drawn > 0 and state.num_computed_tokens == 3 + drawn - 1
    told = [s for report in script.sent if isinstance(report, Progress) for s in report.sequences]
    assert sum(len(s.token_ids) for s in told) == 30, "it goes on afterwards"


def test_imports_are_refused_in_words_and_can_be_aborted(replica: EngineReplica) -> None:
    replica.engine.executor.copy_delay = 3  # type: ignore[attr-defined]
    kv = KVHandle("fake", 1, 1, "token", 0, 0)
    replica.engine.executor.memory["token"] = [[(5, ""), (6, ""), (7, ""), None]]  # type: ignore[attr-defined]
    states = [SequenceState("before", 0, 2, kv=[kv])]
    script = Script(
        [ImportRequests(handover=1, requests=[add("x", "not here")], states=states)],
        [ImportRequests(handover=2, requests=[add("y", None)], states=states)],
        [AbortRequest(request_ids=["y"])],
        *[[] for _ in range(4)],
        [ImportRequests(handover=3, requests=[add("z", None)], states=states)],
        *[[] for _ in range(5)],
    )
    run(replica, script)
    refused, aborted, taken = handover_reports(script)
    assert isinstance(refused, Imported) and "does not hold the adapter" in str(refused.error)
    assert aborted == Imported(handover=2, error="it was aborted") and taken == Imported(handover=3)
    [last] = [s for report in script.sent if isinstance(report, Progress) for s in report.sequences]
    assert last.request_id == "z" and last.finish_reason == "length"
    assert replica.engine.scheduler.blocks.num_free == replica.engine.scheduler.blocks.num_blocks


def test_an_adapter_that_is_sent_ahead_is_loaded_and_told_while_nothing_runs(replica: EngineReplica) -> None:
    # One that the replica has not, or has no more, is passed over.
    script = Script([PrefetchAdapter(content_hash="gone"), PrefetchAdapter(content_hash="hash1")])
    run(replica, script)
    assert residency(script) == {"hash1": "device"}


def test_whoever_was_let_go_is_not_fenced_by_what_comes_behind(replica: EngineReplica) -> None:
    cases = ([Shutdown(), Fence()], False), ([Fence()], True), ([Fence(), Shutdown()], True), ([Fence(), Fence()], True)
    for commands, is_fenced in cases:
        assert run(replica, Script(list(commands))).is_fenced is is_fenced
