"""What a worker keeps when its orchestrator is gone, and what it tells the next one; around a real engine."""

from __future__ import annotations

import itertools
import select
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import EngineConfig
from peft_dist.core.messages import (
    AdapterResult,
    AddRequest,
    AnyReport,
    ExportRequests,
    LoadAdapter,
    PinAdapter,
    Ping,
    Progress,
    Ready,
    Warmth,
)
from peft_dist.core.succession import (
    Adopt,
    DrainKept,
    Identify,
    Identity,
    KeepDrained,
    NameAdapters,
    NamedAdapter,
    NamesKept,
    first_number,
)
from peft_dist.worker.allegiance import Allegiance
from peft_dist.worker.config import WorkerConfig
from peft_dist.worker.heart import Heart
from peft_dist.worker.loop import WorkerLoop
from peft_dist.worker.vigil import Vigil
from tests.worker.fake_replica import fake_model
from tests.worker.test_loop import EngineReplica, Script, add

CONFIG = WorkerConfig(
    endpoint="ipc:///nowhere",
    replica_id=3,
    epoch=7,
    engine=EngineConfig(model="m", device="cpu"),
    told=EngineConfig(model="m"),
    guest="door",
    attempt=2,
)
NAMED = NamedAdapter(AdapterSpec("a", "a", "", {"m": 4}, 10), "from/a")


class Side:
    def __init__(self, sent: list[AnyReport]) -> None:
        self._sent = sent

    def send(self, report: AnyReport) -> None:
        self._sent.append(report)

    def close(self) -> None:
        pass


class NamedScript(Script):
    """Notes under which name each report is sent, and which names it was given."""

    name = "3.7"
    missing: tuple[int, int] | None = None
    watched: list[int]

    def __init__(self, *batches: list[object]) -> None:
        super().__init__(*batches)
        self.names: list[str] = []
        self.beats: list[AnyReport] = []
        self.watched = []

    def watch(self, fd: int) -> None:
        self.watched.append(fd)

    def send(self, report: AnyReport) -> None:
        super().send(report)
        self.names.append(self.name)

    def rename(self, replica_id: int, epoch: int) -> None:
        self.name = f"{replica_id}.{epoch}"

    def is_named(self, replica_id: int, epoch: int) -> bool:
        return self.name == f"{replica_id}.{epoch}"

    def sender(self) -> Side:
        return Side(self.beats)

    def told(self, kind: type) -> list[AnyReport]:
        return [report for report in self.sent if isinstance(report, kind)]


class ModelReplica(EngineReplica):
    model_info = fake_model()


@pytest.fixture
def replica() -> Iterator[ModelReplica]:
    made = ModelReplica()
    yield made
    made.close()


def run(
    replica: ModelReplica,
    script: NamedScript,
    silence: float | None = None,
    find: Callable[[LoadAdapter], Path] = lambda command: Path(command.path),
) -> Vigil:
    vigil = Vigil(silence, 1000.0, end=lambda: None, clock=lambda: script.now)
    heart = Heart(script, 1000.0, vigil)  # type: ignore[arg-type]
    heart.start()
    allegiance = Allegiance(CONFIG, script, heart, vigil)  # type: ignore[arg-type]
    loop = WorkerLoop(
        replica,  # type: ignore[arg-type]
        script,  # type: ignore[arg-type]
        find,
        clock=lambda: script.now,
        allegiance=allegiance,
    )
    loop._driver.adapters = dict(replica.engine.adapters)
    loop.run()
    loop._fetcher.close()
    heart.stop()
    vigil.close()
    return vigil


def endless(name: str) -> AddRequest:
    return add(name, None, tokens=10_000)


def test_whoever_is_asked_drops_requests_and_says_who_it_is(replica: ModelReplica) -> None:
    script = NamedScript()
    script.ready = [endless("r"), endless("held"), ExportRequests(handover=1, request_ids=["held"]), Identify()]
    run(replica, script)
    assert not replica.engine.requests and not replica.engine.scheduler.held
    assert replica.engine.scheduler.blocks.num_free == replica.engine.scheduler.blocks.num_blocks
    replica.handovers.check()
    assert not replica.handovers._exports, "nothing of it is left for a handover of the same number"
    [identity] = script.told(Identity)
    assert isinstance(identity, Identity) and (identity.guest, identity.attempt) == ("door", 2)
    assert identity.engine == CONFIG.told != CONFIG.engine


def test_adapters_and_names_go_on_and_pins_are_for_the_next_to_say(replica: ModelReplica) -> None:
    replica.register_adapter(NAMED.spec, allow_pickle=False, pinned=False)
    pins: list[int] = []
    script = NamedScript(
        [PinAdapter(name="a", content_hash="a")],
        [NameAdapters(version=4, given=[NAMED], is_whole=True)],
        [endless("r"), Adopt(replica_id=1, incarnation=50)],
        [PinAdapter(name="a", content_hash="a")],
    )

    def before_wait() -> bool:
        pins.append(len(replica.engine.scheduler.adapters.pins.specs))
        return False

    script.before_wait = before_wait
    run(replica, script)
    assert script.told(NamesKept) == [NamesKept(version=4)]
    [ready] = script.told(Ready)
    assert isinstance(ready, Ready) and ready.contents == list(replica.engine.adapters.values())
    assert (ready.names, ready.names_version, ready.model) == ([NAMED], 4, replica.model_info)
    number = script.sent.index(ready)
    assert set(script.names[:number]) == {"3.7"} and set(script.names[number:]) == {"1.50"}
    # What is on the device is told at once.
    after = next(report for report in script.sent[number + 1 :] if not isinstance(report, Warmth))
    assert isinstance(after, Progress) and after.detail is not None and not after.sequences
    assert not replica.engine.requests and [number for number, _ in itertools.groupby(pins)] == [0, 1, 0, 1]


def test_that_it_is_drained_is_told_to_every_orchestrator_until_it_is_not(replica: ModelReplica) -> None:
    script = NamedScript(
        [Adopt(replica_id=1, incarnation=50)],
        [KeepDrained(is_drained=True), Adopt(replica_id=1, incarnation=51)],
        [Adopt(replica_id=1, incarnation=52)],
        [KeepDrained(is_drained=False), Adopt(replica_id=1, incarnation=53)],
    )
    run(replica, script)
    assert [ready.is_drained for ready in script.told(Ready)] == [False, True, True, False]  # type: ignore[union-attr]
    assert script.told(DrainKept) == [DrainKept(), DrainKept()]


def test_each_orchestrator_hears_that_it_is_warm(replica: ModelReplica) -> None:
    script = NamedScript([endless("r")], [Adopt(replica_id=1, incarnation=50)], [])
    run(replica, script)
    told = [
        (report.is_warm, name)
        for report, name in zip(script.sent, script.names, strict=True)
        if isinstance(report, Warmth)
    ]
    assert told == [(True, "3.7"), (True, "1.50")]


def test_whoever_is_adopted_twice_is_adopted_once(replica: ModelReplica) -> None:
    """One that loads is asked every second, answers all of it when it is ready, and is adopted as often."""
    adopt = Adopt(replica_id=1, incarnation=50)
    script = NamedScript([adopt, add("r", None, tokens=3), adopt])
    run(replica, script)
    assert len(script.told(Ready)) == 1
    drawn = [each for report in script.told(Progress) for each in report.sequences]  # type: ignore[union-attr]
    assert [each.finish_reason for each in drawn] == [None, None, "length"], "its request goes on"


def test_a_load_for_an_earlier_orchestrator_pins_nothing_for_this_one(replica: ModelReplica) -> None:
    """It was under way when that one ended: this one does not know the name, and would never let go of it."""
    ours = first_number(9)
    early = LoadAdapter(call_id=1, name="early", path="early", pinned=True)
    late = LoadAdapter(call_id=ours + 1, name="late", path="late", pinned=True)
    script = NamedScript([early], [Adopt(replica_id=1, incarnation=ours)], [late])
    is_adopted = threading.Event()

    def find(command: LoadAdapter) -> Path:
        assert is_adopted.wait(60)
        return Path(command.path)

    def before_wait() -> bool:
        """Adopted first, then each load waited for."""
        num_loads = {2: 1, 1: 2}.get(len(script.batches), 0)
        if len(script.told(AdapterResult)) == num_loads:
            return False
        is_adopted.set()
        assert select.select([fd for fd in script.watched if fd >= 0], [], [], 60)[0]
        return True

    script.before_wait = before_wait
    run(replica, script, find=find)
    first, second = script.told(AdapterResult)
    assert isinstance(first, AdapterResult) and isinstance(second, AdapterResult)
    # Of the one slot nobody may have all.
    assert first.error is None and "cannot be pinned" in (second.error or "")
    assert "early" in replica.engine.adapters and not replica.engine.scheduler.adapters.pins.specs


def test_silence_ends_requests_and_any_word_breaks_it(replica: ModelReplica) -> None:
    script = NamedScript([Ping()])
    script.ready = [endless("r")]
    steps = iter(range(100))
    step = replica.engine.step

    def slow_step(now: float) -> list[object]:
        script.now += 1.0
        number = next(steps)
        if number == 5:
            script.ready = [Ping()]
        return step(now)  # type: ignore[return-value]

    replica.engine.step = slow_step  # type: ignore[assignment, method-assign]
    run(replica, script, silence=8.0)
    # Six steps until the word, and eight seconds from then on.
    assert next(steps) == 14 and not replica.engine.requests
    assert replica.engine.scheduler.blocks.num_free == replica.engine.scheduler.blocks.num_blocks
    assert [beat.is_orphaned for beat in script.beats] == [], "nobody hurried it"  # type: ignore[union-attr]


def test_whoever_misses_a_command_drops_requests_and_says_so_until_it_is_another(replica: ModelReplica) -> None:
    script = NamedScript()
    script.ready = [endless("r")]
    beats = threading.Event()
    step = replica.engine.step

    def lossy_step(now: float) -> list[object]:
        script.missing = (2, 3)
        return step(now)  # type: ignore[return-value]

    def before_wait() -> bool:
        """Nothing runs any more: adopt it when its beat was heard."""
        if script.missing is not None:
            assert not replica.engine.requests and beats.wait(60)
            script.missing, script.ready = None, [Adopt(replica_id=1, incarnation=50)]
            return True
        return False

    class Listening(Side):
        def send(self, report: AnyReport) -> None:
            super().send(report)
            beats.set()

    script.sender = lambda: Listening(script.beats)  # type: ignore[method-assign]
    replica.engine.step = lossy_step  # type: ignore[assignment, method-assign]
    script.before_wait = before_wait
    run(replica, script)
    assert [beat.missed for beat in script.beats] == [(2, 3)]  # type: ignore[union-attr]
    assert len(script.told(Ready)) == 1


def test_names_are_replaced_given_and_taken(replica: ModelReplica) -> None:
    other = NamedAdapter(AdapterSpec("b", "b", "", {"m": 4}, 10), "from/b")
    changed = NamedAdapter(AdapterSpec("a", "a2", "", {"m": 4}, 10), "from/a2", pinned=True)
    script = NamedScript(
        [NameAdapters(version=1, given=[NAMED])],
        [NameAdapters(version=2, given=[other])],
        [NameAdapters(version=3, given=[changed]), Adopt(replica_id=0, incarnation=9)],
        [NameAdapters(version=4, given=[], taken=["a", "unknown"]), Adopt(replica_id=0, incarnation=10)],
        [NameAdapters(version=9, given=[NAMED], is_whole=True), Adopt(replica_id=0, incarnation=11)],
    )
    run(replica, script)
    told = [(r.names_version, r.names) for r in script.told(Ready) if isinstance(r, Ready)]
    assert told == [(3, [changed, other]), (4, [other]), (9, [NAMED])]
