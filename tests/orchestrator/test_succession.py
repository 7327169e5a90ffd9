"""An orchestrator that begins with the replicas of another one: adopting them, their names, what is placed."""

from __future__ import annotations

import random

import pytest

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import AdapterError, EngineDeadError, UnknownModelError
from peft_dist.core.messages import (
    AdapterResult,
    Heartbeat,
    LoadAdapter,
    PinAdapter,
    Progress,
    Ready,
    ReplicaStats,
    UnloadAdapter,
)
from peft_dist.core.restarts import RestartPolicy
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.succession import (
    DrainKept,
    KeepDrained,
    NameAdapters,
    NamedAdapter,
    NamesKept,
    first_number,
    life_of,
)
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.events import (
    AdapterLoaded,
    DrainIsKept,
    NamesAreKept,
    Notice,
    PlacementDue,
    ReplicaLost,
    ReplicaRenewed,
    StartReplica,
)
from peft_dist.orchestrator.records import Outgoing, ReplicaState
from tests.orchestrator.world import MiniReplica
from tests.worker.fake_replica import fake_model


def spec(name: str, content: str | None = None) -> AdapterSpec:
    return AdapterSpec(name=name, content_hash=content or f"h-{name}", path=name, ranks={"q": 4}, num_bytes=1)


def named(*names: str, pinned: str = "") -> list[NamedAdapter]:
    return [NamedAdapter(spec(name), f"from/{name}", allow_hub=True, pinned=name == pinned) for name in names]


def heir(number: int = 2, **options: object) -> Orchestrator:
    """An orchestrator that expects replicas of another life."""
    core = Orchestrator(OrchestratorOptions(seed=0, first_number=first_number(7), **options))  # type: ignore[arg-type]
    for replica_id in range(number):
        core.add_replica(replica_id, 0.0, 10.0).is_survivor = True
    return core


def come(
    core: Orchestrator,
    replica_id: int,
    names: list[NamedAdapter],
    version: int,
    contents: list[AdapterSpec] | None = None,
    is_drained: bool = False,
) -> list[Outgoing]:
    held = [one.spec for one in names] if contents is None else contents
    kept = {"names": names, "names_version": version, "is_drained": is_drained}
    report = Ready(model=fake_model(), pid=1, contents=held, **kept)  # type: ignore[arg-type]
    return core.observe(replica_id, core.replicas[replica_id].epoch, report, 1.0)


def commands(out: list[Outgoing], replica_id: int) -> list[object]:
    return [one.command for one in out if one.replica_id == replica_id]


def load(core: Orchestrator, name: str) -> list[Outgoing]:
    call_id, asked = core.load_adapter(name, f"from/{name}")
    out: list[Outgoing] = []
    for one in asked:
        out += core.observe(one.replica_id, one.epoch, AdapterResult(call_id=call_id, spec=spec(name)), 2.0)
    return out


def test_numbers_of_two_lives_never_meet() -> None:
    core, other = heir(), Orchestrator(OrchestratorOptions())
    epochs = [replica.epoch for replica in core.replicas.all()]
    assert {life_of(epoch) for epoch in epochs} == {7} and life_of(other.add_replica(0, 0.0).epoch) == 0
    come(core, 0, [], 0)
    call_id, _ = core.load_adapter("a", "a")
    assert life_of(call_id) == 7
    assert len({life_of(OrchestratorOptions().for_a_life().first_number) for _ in range(50)}) == 50


def test_names_are_those_that_the_replicas_remember_and_nothing_is_loaded_again() -> None:
    core = heir(1)
    out = come(core, 0, named("b", "a", pinned="a"), 5)
    assert [one.name for one in core.adapters.specs()] == ["b", "a"] and core.adapters.pinned == {"a"}
    assert commands(out, 0) == [PinAdapter(name="a", content_hash="h-a")]
    assert core.adapters.is_named_from("a", "from/a", pinned=True, allow_hub=True)
    for other in ({"path": "elsewhere"}, {"pinned": False}, {"allow_hub": False}, {"name": "c"}):
        source = {"name": "a", "path": "from/a", "pinned": True, "allow_hub": True} | other
        assert not core.adapters.is_named_from(**source)  # type: ignore[arg-type]


def test_every_change_is_told_to_all_with_a_number_that_goes_on() -> None:
    core = heir()
    come(core, 0, named("a"), 5)
    come(core, 1, named("a"), 5)
    out = load(core, "b")
    told = [one.command for one in out if isinstance(one.command, NameAdapters)]
    assert len(told) == 2 and told[0] == told[1]
    assert (told[0].version, [one.spec.name for one in told[0].given], told[0].taken) == (6, ["b"], [])
    out = core.unload_adapter("a")
    assert NameAdapters(version=7, given=[], taken=["a"]) in commands(out, 0)
    assert any(isinstance(command, UnloadAdapter) for command in commands(out, 1))


def test_a_change_is_safe_when_all_that_serve_remember_it() -> None:
    core = heir()
    come(core, 0, named("a"), 5)
    core.drain_events()
    load(core, "b")
    first, second = (core.replicas[i] for i in range(2))
    assert not any(isinstance(event, NamesAreKept) for event in core.drain_events())
    core.observe(0, first.epoch, NamesKept(version=6), 2.0)
    assert core.drain_events() == [NamesAreKept(6)]
    # One that has just come was told all, and may not have heard it yet.
    come(core, 1, [], 0)
    core.drain_events()
    core.unload_adapter("b")
    core.observe(0, first.epoch, NamesKept(version=7), 2.0)
    core.observe(1, second.epoch, NamesKept(version=6), 2.0)
    assert core.drain_events() == []
    core.observe(1, second.epoch, NamesKept(version=7), 2.0)
    assert core.drain_events() == [NamesAreKept(7)]
    # Nobody waits for one that is gone.
    core.unload_adapter("a")
    core.observe(0, first.epoch, NamesKept(version=8), 2.0)
    core.lose_replica(1, second.epoch, "it died", 3.0)
    assert NamesAreKept(8) in core.drain_events()


def test_a_replica_that_was_drained_stays_drained_until_it_is_resumed() -> None:
    core = heir(restart=RestartPolicy())
    come(core, 0, named("a"), 5)
    come(core, 1, named("a"), 5)
    assert commands(core.drain_replica(0, 2.0), 0) == [KeepDrained(is_drained=True)]
    assert commands(core.resume_replica(0, 3.0), 0) == [KeepDrained(is_drained=False)]
    # It is safe when all that was said of it is.
    epoch = core.replicas[0].epoch
    core.drain_events()
    core.observe(0, epoch, DrainKept(), 3.0)
    assert DrainIsKept(0) not in core.drain_events()
    core.observe(0, epoch, DrainKept(), 3.0)
    assert DrainIsKept(0) in core.drain_events()
    # One that is to end and be started again is not drained then.
    assert KeepDrained(is_drained=True) not in commands(core.drain_replica(0, 4.0, restart=True), 0)
    core = heir()
    come(core, 0, named("a"), 5, is_drained=True)
    assert not core.replicas.ready() and "drained" in (core.health_error or "")
    come(core, 1, named("a"), 5)
    assert [replica.state for replica in core.replicas.all()] == [ReplicaState.DRAINED, ReplicaState.READY]
    assert any(isinstance(event, Notice) and "/admin/resume/0" in event.text for event in core.drain_events())
    [out] = core.submit(NewRequest("r", [5], SamplingParams(), "a"), 2.0)
    assert out.replica_id == 1
    assert KeepDrained(is_drained=False) in commands(core.resume_replica(0, 3.0), 0)
    [out] = core.submit(NewRequest("s", [5], SamplingParams(), "a"), 3.0)
    assert out.replica_id == 0


def test_of_two_tales_the_later_one_counts_whoever_comes_first() -> None:
    for first, last in ((0, 1), (1, 0)):
        core = heir()
        tales = {0: (named("a", "b"), 5), 1: (named("a"), 6)}
        out = come(core, first, *tales[first])
        out = come(core, last, *tales[last])
        assert [one.name for one in core.adapters.specs()] == ["a"] and core.adapters.version == 6
        told = [command for command in commands(out, 0) if isinstance(command, NameAdapters)]
        if last == 0:
            assert [one.is_whole for one in told] == [True] and [n.spec.name for n in told[0].given] == ["a"]
        # What only the earlier tale named is dropped where it is.
        dropped = [c.content_hash for c in commands(out, 0) if isinstance(c, UnloadAdapter)]
        assert dropped == ["h-b"]


def test_what_a_replica_lacks_is_brought_to_it() -> None:
    core = heir()
    come(core, 0, named("a"), 5)
    out = come(core, 1, named("a", "b"), 6)
    [load_b] = [command for command in commands(out, 0) if isinstance(command, LoadAdapter)]
    assert (load_b.name, load_b.path, load_b.allow_hub) == ("b", "from/b", True)
    assert [c.is_whole for c in commands(out, 0) if isinstance(c, NameAdapters)] == [True]
    core.add_replica(2, 1.0)
    out = come(core, 2, [], 0)
    assert [c.name for c in commands(out, 2) if isinstance(c, LoadAdapter)] == ["a", "b"]
    assert [len(c.given) for c in commands(out, 2) if isinstance(c, NameAdapters)] == [2]


def test_once_this_life_has_changed_a_name_no_earlier_one_counts() -> None:
    core = heir()
    come(core, 0, named("a"), 5)
    load(core, "new")
    # Of the same number, and of a higher one: both went on from where this life did not.
    for version in (6, 9):
        out = come(core, 1, named("a", "other"), version)
        assert [one.name for one in core.adapters.specs()] == ["a", "new"]
        [told] = [c for c in commands(out, 1) if isinstance(c, NameAdapters)]
        assert told.is_whole and [one.spec.name for one in told.given] == ["a", "new"]
        assert [c.name for c in commands(out, 1) if isinstance(c, LoadAdapter)] == ["new"]
        core.lose_replica(1, core.replicas[1].epoch, "it died", 3.0)
        core.add_replica(1, 3.0)


def test_a_load_of_another_life_that_ends_now_gives_no_name() -> None:
    core = heir(1)
    come(core, 0, [], 0)
    call_id, _ = core.load_adapter("mine", "from/mine")
    # The earlier orchestrator's call of the least number.
    out = core.observe(0, core.replicas[0].epoch, AdapterResult(call_id=1, spec=spec("theirs")), 2.0)
    assert out == [] and not core.adapters.specs(), "nothing is dropped while a load is under way"
    core.drain_events()
    out = core.observe(0, core.replicas[0].epoch, AdapterResult(call_id=call_id, spec=spec("mine")), 2.0)
    assert [c.content_hash for c in commands(out, 0) if isinstance(c, UnloadAdapter)] == ["h-theirs"]
    [loaded] = core.drain_events()
    assert isinstance(loaded, AdapterLoaded) and loaded.spec.name == "mine"


@pytest.mark.parametrize("restart", [None, RestartPolicy()])
def test_an_expected_replica_that_does_not_come_is_started(restart: RestartPolicy | None) -> None:
    core = heir(1, restart=restart)
    assert core.next_deadline() == 10.0
    core.tick(10.0)
    lost, start = core.drain_events()
    assert isinstance(lost, ReplicaLost) and lost.hangs, "it does not even beat"
    epoch = core.replicas[0].epoch
    assert start == StartReplica(0, epoch) and not core.replicas[0].is_survivor
    # From now on it is one like any other.
    core.lose_replica(0, epoch, "it died", 11.0)
    assert core.replicas[0].restart_at == (None if restart is None else 12.0)


def test_a_replica_that_hears_nothing_is_given_up_and_goes_on_as_another() -> None:
    core = heir(1)
    come(core, 0, [], 0)
    core.drain_events()
    beat = Heartbeat(busy_seconds=0.0, is_orphaned=True)
    core.observe(0, core.replicas[0].epoch, beat, 2.0)
    [lost] = core.drain_events()
    assert isinstance(lost, ReplicaRenewed) and "heard nothing" in str(lost.error)


@pytest.mark.parametrize("kind", ["rr", "dlora"])
def test_the_placement_is_that_of_the_adapters_on_the_devices(kind: str) -> None:
    core = heir(2, migration=kind)
    contents = [spec(name) for name in ("a", "b", "c")]
    on_device = {0: ["h-c", "h-a"], 1: ["h-b"]}
    for replica_id, resident in on_device.items():
        come(core, replica_id, named("a", "b", "c"), 3, contents)
        stats = ReplicaStats(num_blocks=10, num_free_blocks=10, resident_adapters=resident)
        core.observe(replica_id, core.replicas[replica_id].epoch, Progress(sequences=[], stats=stats), 1.0)
    core.drain_events()
    core.tick(2.0)
    if kind == "rr":
        placement = core.migration.hosting.placement
    else:
        [due] = [event for event in core.drain_events() if isinstance(event, PlacementDue)]
        placement = due.search.run()
    assert placement is not None
    for replica_id, resident in on_device.items():
        assert all(replica_id in placement.hosts[content] for content in resident)
    if kind == "rr":
        assert placement.hosts == {"h-a": {0}, "h-b": {1}, "h-c": {0}}


class Cluster:
    """Replicas in miniature, and one orchestrator after another. What is on its way may never arrive."""

    def __init__(self, rng: random.Random, number: int) -> None:
        self.rng = rng
        self.core = Orchestrator(OrchestratorOptions(seed=0))
        self.replicas = {i: MiniReplica(self.core.add_replica(i, 0.0).epoch) for i in range(number)}
        self.known: dict[int, list[tuple[str, str]]] = {0: []}
        self.life = 0

    def send(self, out: list[Outgoing]) -> None:
        for one in out:
            replica = self.replicas.get(one.replica_id)
            if replica is not None and replica.epoch == one.epoch:
                replica.commands.append(one.command)
        self.known[self.core.adapters.version] = [(one.name, one.content_hash) for one in self.core.adapters.specs()]

    def work(self, replica_id: int) -> bool:
        """Let a replica take a command, or the orchestrator a report; whether there was one."""
        replica = self.replicas[replica_id]
        if replica.reports and (not replica.commands or self.rng.random() < 0.5):
            self.send(self.core.observe(replica_id, replica.epoch, replica.reports.popleft(), 1.0))
        elif replica.commands:
            replica.work()
        else:
            return False
        return True

    def change(self) -> None:
        """A load or an unload, where it is allowed."""
        name, path = self.rng.choice("abc"), self.rng.choice("xyz")
        try:
            if self.rng.random() < 0.7:
                self.send(self.core.load_adapter(name, path, replace=True, pinned=self.rng.random() < 0.3)[1])
            else:
                self.send(self.core.unload_adapter(name))
        except (AdapterError, EngineDeadError, UnknownModelError):
            return

    def crash(self) -> None:
        """Some replicas die with the orchestrator, perhaps; the next one hears the others, one after another."""
        self.life += 1
        left = [i for i in self.replicas if self.rng.random() < 0.8]
        latest = max((self.replicas[i].names.version for i in left), default=0)
        expected = self.known[latest]
        self.core = Orchestrator(OrchestratorOptions(seed=0, first_number=first_number(self.life)))
        for i in self.replicas:
            self.core.add_replica(i, 0.0).is_survivor = i in left
        self.replicas = {
            i: replica if i in left else MiniReplica(self.core.replicas[i].epoch)
            for i, replica in self.replicas.items()
        }
        self.rng.shuffle(left)
        for i in left:
            self.replicas[i].adopted(self.core.replicas[i].epoch)
            self.send(self.core.observe(i, self.replicas[i].epoch, self.replicas[i].reports.popleft(), 1.0))
        assert [(one.name, one.content_hash) for one in self.core.adapters.specs()] == expected

    def settle(self) -> None:
        while sum(self.work(i) for i in self.replicas):
            continue
        named = [(one.name, one.content_hash) for one in self.core.adapters.specs()]
        pinned = {
            one.name: one.content_hash for one in self.core.adapters.specs() if one.name in self.core.adapters.pinned
        }
        for replica in self.replicas.values():
            assert replica.held == {content for _, content in named}
            assert [(one.spec.name, one.spec.content_hash) for one in replica.names.all()] == named
            assert replica.names.version == self.core.adapters.version and replica.pins == pinned


@pytest.mark.parametrize("seed", range(200))
def test_whatever_arrived_before_a_crash_the_registry_is_the_latest_that_a_replica_knew(seed: int) -> None:
    rng = random.Random(seed)
    cluster = Cluster(rng, rng.randrange(1, 4))
    for _ in range(rng.randrange(2, 5)):
        for _ in range(rng.randrange(60)):
            if rng.random() < 0.2:
                cluster.change()
            else:
                cluster.work(rng.choice(list(cluster.replicas)))
        if rng.random() < 0.3:
            cluster.settle()
        cluster.crash()
    cluster.settle()
