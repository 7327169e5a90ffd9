"""Replicas restarted one after another: who is next, when, and why it stops."""

from __future__ import annotations

import random

import pytest

from peft_dist.core.errors import ReplicaStateError
from peft_dist.core.messages import AdapterResult, Heartbeat, LoadAdapter, Shutdown
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.records import Outgoing
from peft_dist.orchestrator.rolling import RollingRestart
from tests.orchestrator.test_core import tokens
from tests.orchestrator.test_lifecycle import cluster, ready
from tests.orchestrator.world import mini_spec


class Driver:
    """A rolling restart that looks after every call, as the service's does."""

    def __init__(self, core: Orchestrator) -> None:
        self.core, self.now = core, 1.0
        self.sent: list[Outgoing] = []
        self.rolling = RollingRestart(core, self.act, lambda: self.now)

    def act(self, out: list[Outgoing]) -> None:
        self.sent += out
        self.rolling.look()

    @property
    def at(self) -> tuple[str, str | None, int | None]:
        view = self.rolling.view()
        return view.state, view.stage, view.current

    def told_to_end(self) -> list[int]:
        return list(dict.fromkeys(out.replica_id for out in self.sent if out.command == Shutdown()))

    def ends(self, replica_id: int) -> None:
        """Its process does, and the next one is started."""
        self.act(self.core.lose_replica(replica_id, self.core.replicas[replica_id].epoch, "it ended", self.now))
        self.act(self.core.tick(self.now))

    def is_ready(self, replica_id: int) -> list[Outgoing]:
        out = ready(self.core, replica_id, self.core.replicas[replica_id].epoch, self.now)
        self.act(out)  # type: ignore[arg-type]
        return out  # type: ignore[return-value]


def bind(core: Orchestrator) -> None:
    """Have replica 0 run a request of an adapter that no other replica holds (any more), though it has a name."""
    call_id, _ = core.load_adapter("one", "one")
    for replica_id in (0, 1):
        core.observe(replica_id, replica_id + 1, AdapterResult(call_id=call_id, spec=mini_spec("one", "one")), 0.0)
    core._calls._holdings.drop("h-one")
    core._calls._holdings.add(0, "h-one")
    core.submit(NewRequest("r", [5], SamplingParams(max_tokens=9), "one"), 0.0)


def test_one_after_another_each_once_it_serves() -> None:
    core = cluster(3)
    it = Driver(core)
    epochs = [core.replicas[i].epoch for i in range(3)]
    assert it.at == ("none", None, None)
    began = it.rolling.begin()
    assert (began.current, began.stage, began.left) == (0, "draining", (1, 2)) and it.told_to_end() == [0]
    with pytest.raises(ReplicaStateError, match="under way, at replica 0"):
        it.rolling.begin()
    for replica_id in range(3):
        assert it.at == ("running", "draining", replica_id) and it.told_to_end() == [*range(replica_id + 1)]
        assert len(core.replicas.ready()) == 2
        it.ends(replica_id)
        assert it.at == ("running", "starting", replica_id)
        it.is_ready(replica_id)
    view = it.rolling.view()
    assert (view.state, view.restarted, view.left, view.current) == ("done", (0, 1, 2), (), None)
    assert all(core.replicas[i].epoch > epochs[i] and core.replicas[i].num_failures == 0 for i in range(3))
    assert it.rolling.begin().current == 0, "another one can follow"


def test_it_waits_until_requests_have_left_and_adapters_have_come() -> None:
    core = cluster(2)
    bind(core)
    it = Driver(core)
    it.rolling.begin()
    assert it.at == ("running", "draining", 0) and it.told_to_end() == []
    it.act(core.observe(0, 1, tokens("r-0", [1], 0, "stop"), 1.0))
    assert it.told_to_end() == [0]
    it.ends(0)
    loads = [out.command for out in it.is_ready(0) if isinstance(out.command, LoadAdapter)]
    assert it.at == ("running", "starting", 0) and len(loads) == 1
    epoch = core.replicas[0].epoch
    it.act(core.observe(0, epoch, AdapterResult(call_id=loads[0].call_id, spec=mini_spec("one", "one")), 2.0))
    assert it.at == ("running", "draining", 1)


def load(core: Orchestrator, name: str) -> None:
    """Give a name to an adapter that all replicas of a new cluster hold from then on."""
    call_id, _ = core.load_adapter(name, name)
    for replica in core.replicas.all():
        core.observe(replica.replica_id, replica.epoch, AdapterResult(call_id=call_id, spec=mini_spec(name, name)), 0.0)


def refuse(it: Driver, replica_id: int, name: str) -> None:
    """A replica has become ready, and refuses one of the adapters that it is brought; it takes the others."""
    epoch = it.core.replicas[replica_id].epoch
    for command in [out.command for out in it.is_ready(replica_id) if isinstance(out.command, LoadAdapter)]:
        spec = mini_spec(command.name, command.path)
        answer = {"error": "it is damaged"} if command.name == name else {"spec": spec}
        it.act(it.core.observe(replica_id, epoch, AdapterResult(call_id=command.call_id, **answer), it.now))  # type: ignore[arg-type]


def test_it_stops_where_a_replica_comes_back_without_an_adapter() -> None:
    core = cluster(3)
    load(core, "one"), load(core, "two")
    it = Driver(core)
    it.rolling.begin()
    it.ends(0)
    refuse(it, 0, "two")
    view = it.rolling.view()
    assert (view.state, view.current, view.restarted, view.left) == ("stopped", 0, (), (1, 2))
    assert view.error == "replica 0 came back and refused adapter 'two': it is damaged"
    assert it.told_to_end() == [0], "the others go on with it"


def test_a_replica_that_refused_an_adapter_comes_first_and_one_that_alone_holds_it_is_left() -> None:
    core = cluster(3)
    load(core, "one")
    it = Driver(core)
    for replica_id in (1, 2):
        it.now += 10.0
        it.ends(replica_id)
        it.now += 10.0
        it.act(core.tick(it.now))
        refuse(it, replica_id, "one")
    it.sent.clear()
    began = it.rolling.begin()
    assert (began.current, began.left) == (1, (2, 0)) and it.told_to_end() == [1]
    it.ends(1)
    refuse(it, 1, "another")
    assert it.at == ("running", "draining", 2) and core.replicas[1].refused == {}
    it.ends(2)
    refuse(it, 2, "another")
    assert it.at == ("running", "draining", 0), "others hold it now"
    # Replicas that joined are restarted by nobody here.
    core = cluster(1)
    load(core, "one")
    guest = core.replicas.join(9.0)
    it = Driver(core)
    refuse(it, guest.replica_id, "one")
    with pytest.raises(ReplicaStateError, match="replica 0 alone holds adapter 'one', which replica 1 refused: it is"):
        it.rolling.begin()
    assert it.told_to_end() == [] and core.replicas[0].state.value == "ready"


def test_a_replica_that_goes_on_in_the_same_process_was_not_restarted() -> None:
    core = cluster(2)
    it = Driver(core)
    it.rolling.begin()
    it.ends(0)
    orphaned = Heartbeat(busy_seconds=0.0, is_orphaned=True)
    it.act(core.observe(1, core.replicas[1].epoch, orphaned, it.now))
    it.is_ready(0)
    assert it.at == ("running", "waiting", 1) and it.told_to_end() == [0]
    it.act(core.observe(0, core.replicas[0].epoch, orphaned, it.now))
    it.is_ready(1)
    assert it.at == ("running", "waiting", 1) and it.told_to_end() == [0], "the other one becomes another, too"
    it.is_ready(0)
    assert it.at == ("running", "draining", 1) and it.told_to_end() == [0, 1]
    it.ends(1)
    it.act(core.observe(1, core.replicas[1].epoch, orphaned, it.now))
    assert it.at == ("running", "starting", 1)
    it.is_ready(1)
    assert it.at == ("done", None, None)


def test_it_waits_for_others_that_start() -> None:
    core = cluster(3)
    it = Driver(core)
    it.act(core.lose_replica(2, 3, "it died", 1.0))
    it.rolling.begin()
    assert it.at == ("running", "waiting", 0) and it.told_to_end() == [2]
    it.now = 2.0
    it.act(core.tick(2.0))
    assert it.at == ("running", "waiting", 0)
    it.is_ready(2)
    assert it.at == ("running", "draining", 0)


def test_one_that_died_and_came_back_meanwhile_need_not_be_restarted() -> None:
    core = cluster(3)
    it = Driver(core)
    it.rolling.begin()
    it.ends(0)
    it.act(core.lose_replica(1, 2, "it died", 1.0))
    it.is_ready(0)
    assert it.at == ("running", "waiting", 1)
    it.now = 2.0
    it.act(core.tick(2.0))
    it.is_ready(1)
    assert it.at == ("running", "draining", 2) and it.rolling.view().restarted == (0, 1)


def test_one_that_was_drained_and_came_back_so_is_not_waited_for() -> None:
    core = cluster(3)
    core.drain_replica(2, 1.0)
    it = Driver(core)
    it.rolling.begin()
    it.act(core.lose_replica(2, 3, "it died", 1.0))
    it.ends(0)
    it.is_ready(0)
    # It will not serve, so nobody waits for it before its turn.
    assert it.at == ("running", "draining", 1)
    it.now = 2.0
    it.act(core.tick(2.0))
    it.ends(1)
    it.is_ready(1)
    assert it.at == ("running", "starting", 2)
    it.is_ready(2)
    assert it.at == ("done", None, None) and core.replicas[2].state.value == "drained"


def test_it_stops_at_one_that_does_not_come_back() -> None:
    core = cluster(2)
    it = Driver(core)
    it.rolling.begin()
    it.ends(0)
    it.act(core.lose_replica(0, core.replicas[0].epoch, "exited with status 1", 3.0))
    view = it.rolling.view()
    assert (view.state, view.current, view.left) == ("stopped", 0, (1,))
    assert view.error == "replica 0 did not come back: exited with status 1"
    it.now = core.next_deadline()
    it.act(core.tick(it.now))
    it.is_ready(0)
    assert it.told_to_end() == [0], "what comes back later resumes nothing"
    assert it.rolling.begin().state == "running"


def test_it_stops_where_somebody_resumes_a_replica_or_the_server_ends() -> None:
    core = cluster(2)
    core.lives.drain(1, leave=False)
    it = Driver(core)
    with pytest.raises(ReplicaStateError, match="replica 0 is the only one that serves"):
        it.rolling.begin()
    core.resume_replica(1, 1.0)
    bind(core)
    it.rolling.begin()
    assert it.at == ("running", "draining", 0) and it.told_to_end() == []
    it.act(core.resume_replica(0, 1.0))
    assert it.rolling.view().error == "replica 0 was resumed"
    ended = Driver(cluster(2))
    ended.rolling.begin()
    ended.act(ended.core.shut_down())
    assert ended.at[0] == "stopped"


def test_a_replica_that_drains_to_be_restarted_is_not_drained_by_hand_as_well() -> None:
    core = cluster(2)
    bind(core)
    it = Driver(core)
    it.rolling.begin()
    with pytest.raises(ReplicaStateError, match="replica 0 drains to be restarted: POST /admin/resume/0 ends that"):
        core.drain_replica(0, 1.0)
    it.act(core.observe(0, 1, tokens("r-0", [1], 0, "stop"), 1.0))
    assert it.at == ("running", "draining", 0) and it.told_to_end() == [0], "it goes on"
    core = cluster(2)
    bind(core)
    it = Driver(core)
    it.rolling.begin()
    # Between two looks.
    it.act(core.resume_replica(0, 1.0) + core.drain_replica(0, 1.0))
    assert it.rolling.view().error == "replica 0 was resumed, and is drained by hand: POST /admin/resume/0"
    # To one that drains by hand it may come, as to any other.
    it = Driver(core)
    it.rolling.begin()
    it.act(core.observe(0, 1, tokens("r-0", [1], 0, "stop"), 1.0))
    assert it.at == ("running", "draining", 0) and it.told_to_end() == [0]


def test_it_goes_no_further_when_it_is_cancelled() -> None:
    core = cluster(2)
    it = Driver(core)
    with pytest.raises(ReplicaStateError, match="nothing to stop"):
        it.rolling.cancel()
    it.rolling.begin()
    assert it.rolling.cancel().error == "somebody asked for it"
    it.ends(0)
    it.is_ready(0)
    assert it.told_to_end() == [0] and len(core.replicas.ready()) == 2 and it.at[0] == "stopped"


def test_where_it_cannot_be_done() -> None:
    for core, why in (
        (cluster(1), "--replicas 2"),
        (cluster(2, restart=None), "--restart"),
    ):
        with pytest.raises(ReplicaStateError, match=why):
            Driver(core).rolling.begin()
    core = cluster(0)
    guest = core.replicas.join(9.0)
    ready(core, guest.replica_id, guest.epoch, 1.0)
    with pytest.raises(ReplicaStateError, match="restart those that joined"):
        Driver(core).rolling.begin()


def test_replicas_that_joined_are_left_alone() -> None:
    core = cluster(1)
    guest = core.replicas.join(9.0)
    ready(core, guest.replica_id, guest.epoch, 1.0)
    it = Driver(core)
    assert it.rolling.begin().skipped == (guest.replica_id,) and it.told_to_end() == [0]
    it.ends(0)
    it.is_ready(0)
    assert it.at == ("done", None, None) and it.told_to_end() == [0]


def test_never_two_at_a_time_and_it_ends_whatever_happens() -> None:
    outcomes = set()
    for seed in range(200):
        rng, core = random.Random(seed), cluster(3)
        it = Driver(core)
        it.rolling.begin()
        while it.rolling.view().is_running:
            replica = core.replicas[rng.randrange(3)]
            it.now += rng.choice([0.1, 2.0])
            before = [r for r in core.replicas.all() if r.leaves]
            if replica.is_alive and not replica.leaves and rng.random() < 0.05:
                it.act(core.lose_replica(replica.replica_id, replica.epoch, "it died", it.now))
            elif replica.state.value == "starting":
                it.is_ready(replica.replica_id)
            elif replica.leaves:
                it.ends(replica.replica_id)
            else:
                it.act(core.tick(it.now))
            leaving = [r for r in core.replicas.all() if r.leaves]
            assert len(leaving) <= 1 and (leaving == before or not leaving or len(core.replicas.ready()) == 2)
        outcomes.add(it.rolling.view().state)
    assert outcomes == {"done", "stopped"}
