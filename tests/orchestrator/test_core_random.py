"""Any order of events on two replicas that die and are drained: nothing is lost, everything ends exactly once with the
tokens it would have had on one replica, nothing stale is believed."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter, deque
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peft_dist.core.errors import (
    AdapterError,
    EngineDeadError,
    QueueFullError,
    ReplicaStateError,
    UnknownModelError,
)
from peft_dist.core.messages import AddRequest, Heartbeat, Progress, ReplicaStats, SequenceProgress
from peft_dist.core.restarts import RestartPolicy
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.events import (
    AdapterLoaded,
    AdapterRefused,
    PlacementDue,
    PlanDue,
    ReplicaDrained,
    RequestFailed,
    SequenceEvent,
    StartReplica,
)
from peft_dist.orchestrator.records import Outgoing, ReplicaState
from peft_dist.orchestrator.survey import Surveyed
from peft_dist.orchestrator.turns import kv_bytes
from peft_dist.placement.aggregation import RequestMove
from peft_dist.placement.placer import KINDS, MigrationKind, Search
from peft_dist.placement.planning import greedy_plan
from tests.orchestrator.world import GONE, MODEL, MiniReplica, drawn_token
from tests.worker.fake_replica import NUM_BLOCKS

MAX_NUM_SEQS, MAX_QUEUE, NUM_REPLICAS = 2, 2, 2
NAMES = st.sampled_from(["red", "blue"])
CONTENTS = st.sampled_from(["one", "two", "broken"])
IDS = st.integers(0, NUM_REPLICAS - 1)


class Machine(RuleBasedStateMachine):
    """The client's view is kept apart and compared: tokens so far and ends of every accepted request."""

    @initialize(kind=st.sampled_from(KINDS), loaded=st.booleans(), at_once=st.sampled_from([1, 2, 4]))
    def begin(self, kind: MigrationKind, loaded: bool, at_once: int) -> None:
        restart = RestartPolicy(first=0.0, longest=0.0, max_failures=10**6)
        options = OrchestratorOptions(
            MAX_NUM_SEQS, MAX_QUEUE, seed=0, max_wait=1e9, restart=restart, migration=kind, prefix_caching=True,
            max_handovers=at_once, max_handover_bytes=MODEL.block_bytes * 8,
        )  # fmt: skip
        self.core = Orchestrator(options)
        self.core._placer.moves_at_once = at_once
        self.kind = kind
        self.searches: deque[Search] = deque()
        self.plan_is_due = False
        self.moves: list[tuple[RequestMove, Surveyed]] = []
        self.now = 0.0
        self.count = 0
        self.seeds: dict[str, int] = {}
        self.contents: dict[str, str | None] = {}
        self.tokens: dict[tuple[str, int], int] = {}
        self.open: set[tuple[str, int]] = set()
        self.hits: Counter[str] = Counter()
        self.named: dict[str, str] = {}
        self.pinned: set[str] = set()
        self.loading: dict[int, tuple[str, str, bool]] = {}
        self.replicas: dict[int, MiniReplica] = {}
        self.leaving: set[int] = set()
        self.ghosts: deque[tuple[int, MiniReplica]] = deque(maxlen=2)
        for replica_id in range(NUM_REPLICAS):
            self.replicas[replica_id] = MiniReplica(self.core.add_replica(replica_id, self.now).epoch)
            self.deliver_all(replica_id)
        for name, path in (("red", "one"), ("blue", "two")) if loaded else ():
            self.load(name, path, replace=False, pin=None)
            for replica_id in self.replicas:
                self.everything_under_way_arrives(replica_id)

    def _send(self, commands: list[Outgoing]) -> None:
        for out in commands:
            replica = self.replicas[out.replica_id]
            if out.epoch == replica.epoch:
                replica.commands.append(out.command)
            if isinstance(out.command, AddRequest) and self.kind == "rr":
                is_placed = self._is_in_its_place(out.replica_id, out.command.content_hash)
                assert is_placed, "sent to a replica where its adapter is not placed"
        self._hear()

    def _is_in_its_place(self, replica_id: int, content: str | None) -> bool:
        """Whether requests of a content are, or with none of its hosts at hand may be, sent to a replica."""
        placement = self.core.migration.hosting.placement
        if not content or placement is None:
            return True
        able = {r.replica_id for r in self.core.replicas.ready() if self.core._calls.holds(r, content)}
        hosts = placement.hosts.get(content, frozenset())
        return replica_id in hosts or not hosts & able

    def _hear(self) -> None:
        for event in self.core.drain_events():
            match event:
                case SequenceEvent(request_id, index, progress):
                    key = (request_id, index)
                    assert key in self.open, "an event of a sequence that had ended"
                    first = self.tokens[key]
                    assert progress.first_index == first
                    right = [
                        drawn_token(self.seeds[request_id], index, first + k) for k in range(len(progress.token_ids))
                    ]
                    assert progress.token_ids == right
                    self.tokens[key] += len(progress.token_ids)
                    if progress.finish_reason is not None:
                        assert progress.finish_reason != "error" or progress.error == GONE
                        self.open.remove(key)
                case RequestFailed(request_id, error):
                    assert isinstance(error, EngineDeadError)
                    keys = {key for key in self.open if key[0] == request_id}
                    assert keys, "a request failed that had ended"
                    content = self.contents[request_id]
                    lost_with_its_replica = content is not None and content not in self.named.values()
                    assert self.hits[request_id] >= 2 or lost_with_its_replica, error
                    self.open -= keys
                case AdapterLoaded(call_id, spec):
                    name, path, pinned = self.loading.pop(call_id)
                    assert (spec.name, spec.content_hash) == (name, f"h-{path}")
                    self.named[name] = spec.content_hash
                    (self.pinned.add if pinned else self.pinned.discard)(name)
                case AdapterRefused(call_id, _):
                    del self.loading[call_id]
                case PlacementDue(search):
                    assert self.kind != "rr" and not self.searches
                    self.searches.append(search)
                case PlanDue():
                    assert self.kind == "dlora" and not (self.plan_is_due or self.moves)
                    self.plan_is_due = True
                case StartReplica(replica_id, epoch):
                    self.replicas[replica_id] = MiniReplica(epoch)
                case ReplicaDrained(replica_id, leaves):
                    assert not self.core._requests.on_replica(replica_id)
                    if leaves:
                        self.leaving.add(replica_id)

    @rule(n=st.integers(1, 3), max_tokens=st.one_of(st.none(), st.integers(1, 4)), name=st.one_of(st.none(), NAMES))
    def submit(self, n: int, max_tokens: int | None, name: str | None) -> None:
        self.count += 1
        new = NewRequest(f"r{self.count}", [5] * 10, SamplingParams(n=n, max_tokens=max_tokens), name)
        before, num_ready = self.core.room.num_held, len(self.core.replicas.ready())
        try:
            out = self.core.submit(new, self.now)
        except QueueFullError as error:
            assert before + n > num_ready * MAX_NUM_SEQS + MAX_QUEUE and error.retry_after >= 1
            return
        except UnknownModelError:
            assert name is not None and name not in self.named
            return
        except EngineDeadError:
            assert not num_ready
            return
        assert name is None or name in self.named, "an answer from another model"
        for index in range(n):
            self.open.add((new.request_id, index))
            self.tokens[(new.request_id, index)] = 0
        self.contents[new.request_id] = self.named[name] if name else None
        adds = [o.command for o in out]
        for index, add in enumerate(adds):
            assert isinstance(add, AddRequest) and add.request_id == f"{new.request_id}-{index}"
            assert add.params.max_tokens == (max_tokens or 10) and add.content_hash == self.contents[new.request_id]
        [record] = [r for r in self.core._requests.records() if r.request_id == new.request_id]
        self.seeds[new.request_id] = record.seed
        assert len(adds) in (0, n) and len({o.replica_id for o in out}) <= 1
        assert adds or name is not None, "only an adapter that is still on its way can make a request wait"
        self._send(out)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data: st.DataObject, whole: bool) -> None:
        request_id, index = data.draw(st.sampled_from(sorted(self.open)))
        self._send(self.core.abort(request_id, self.now, None if whole else index))
        assert (request_id, index) not in self.open
        assert not whole or all(key[0] != request_id for key in self.open)

    @rule(name=NAMES, path=CONTENTS, replace=st.booleans(), pin=st.sampled_from([None, True, False]))
    def load(self, name: str, path: str, replace: bool, pin: bool | None) -> None:
        try:
            call_id, out = self.core.load_adapter(name, path, replace=replace, pinned=pin)
        except AdapterError:
            taken = name in self.named and not replace
            assert taken or name in {loading for loading, _, _ in self.loading.values()}
            return
        except EngineDeadError:
            assert not self.core.replicas.ready()
            return
        self.loading[call_id] = (name, path, name in self.pinned if pin is None else pin)
        self._send(out)

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        if name in self.named:
            del self.named[name]
            self.pinned.discard(name)
            self._send(self.core.unload_adapter(name))
            with pytest.raises(UnknownModelError):
                self.core.adapters.resolve(f"__base__:{name}")
        else:
            with pytest.raises(UnknownModelError):
                self.core.unload_adapter(name)

    @rule(replica_id=IDS, times=st.integers(1, 3))
    def replica_takes_commands(self, replica_id: int, times: int) -> None:
        for _ in range(min(times, len(self.replicas[replica_id].commands))):
            self.replicas[replica_id].work()

    @rule(replica_id=IDS)
    def replica_steps(self, replica_id: int) -> None:
        if self.replicas[replica_id].running:
            self.replicas[replica_id].step()

    @rule(replica_id=IDS, content=CONTENTS.map("h-{}".format))
    def replica_lacks_the_files_of_what_it_took(self, replica_id: int, content: str) -> None:
        self.replicas[replica_id].lack(content)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), with_kv=st.sampled_from([None, True, True, True, False]), stages=st.integers(0, 3))
    def move(self, data: st.DataObject, with_kv: bool | None, stages: int) -> None:
        """``stages``: How far it gets before anything else happens."""
        name = data.draw(st.sampled_from(sorted({request_id for request_id, _ in self.open})))
        [record, *_] = [record for record, _ in self.core._requests.running(name)]
        source, target = record.replica_id, 0 if record.replica_id else 1
        if self.kind == "rr" and not self._is_in_its_place(target, record.content_hash):
            return  # Whoever moves a request by hand may send it anywhere, which is not what is looked for here.
        self._send(self.core.handover.move(name, target, self.now, with_kv=with_kv))
        for replica_id in [source, target, source][:stages]:
            if replica_id is not None:
                self.everything_under_way_arrives(replica_id)

    @rule(replica_id=IDS, fails=st.sampled_from([False, False, True]))
    def copies_end(self, replica_id: int, fails: bool) -> None:
        replica = self.replicas[replica_id]
        replica.has_failing_copies = fails
        replica.end_copies()
        replica.has_failing_copies = False

    @rule()
    def a_deadline_passes(self) -> None:
        if (deadline := self.core.handover.next_deadline()) < 1e9:
            self.now = max(self.now, deadline)
            self._send(self.core.tick(self.now))

    @rule(replica_id=IDS)
    def replica_begins_a_step(self, replica_id: int) -> None:
        self.replicas[replica_id].start()

    @rule(replica_id=IDS)
    def everything_under_way_arrives(self, replica_id: int) -> None:
        replica = self.replicas[replica_id]
        while replica.commands:
            replica.work()
        replica.end_copies()
        self.deliver_all(replica_id)

    @rule(replica_id=IDS)
    def deliver_a_report(self, replica_id: int) -> None:
        self.now += 0.1
        replica = self.replicas[replica_id]
        if replica.reports:
            self._send(self.core.observe(replica_id, replica.epoch, replica.reports.popleft(), self.now))

    def deliver_all(self, replica_id: int) -> None:
        while self.replicas[replica_id].reports:
            self.deliver_a_report(replica_id)

    @rule(seconds=st.sampled_from([0.2, 1.5, 12.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self._send(self.core.tick(self.now))

    @precondition(lambda self: self.searches)
    @rule(fails=st.booleans())
    def a_search_ends(self, fails: bool) -> None:
        search = self.searches.popleft()
        self._send(self.core.migration.placed(search, None if fails else search.run(), self.now))

    @precondition(lambda self: self.plan_is_due)
    @rule(data=st.data())
    def a_plan_comes(self, data: st.DataObject) -> None:
        """Any plan: what a planner could say, and what it could not."""
        self.make_plan(lambda most: data.draw(st.integers(0, most)))

    def make_plan(self, choose: Callable[[int], int]) -> None:
        self.plan_is_due = False
        survey = self.core.migration.survey()
        while survey.step():
            pass
        seen = survey.result(self.now)
        assert greedy_plan(seen.view).after <= greedy_plan(seen.view).before + 1e-9
        for one, names in zip(seen.view.classes, seen.members, strict=True):
            chosen = names[: choose(len(names))]
            moves = [RequestMove(name, one.source, 1 - one.source, "recompute") for name in chosen]
            self.moves += [(move, seen) for move in moves]
        if not self.moves:
            self.core.migration.planned("stay", 0.1, self.now)

    @precondition(lambda self: self.moves)
    @rule(number=st.integers(1, 3))
    def some_of_a_plan_is_carried_out(self, number: int) -> None:
        some, self.moves = self.moves[:number], self.moves[number:]
        self._send(self.core.migration.move([move for move, _ in some], some[0][1], self.now))
        if not self.moves:
            self.core.migration.planned("solver", 0.1, self.now)

    @precondition(lambda self: self.ghosts)
    @rule()
    def the_late_words_of_a_fenced_replica_change_nothing(self) -> None:
        replica_id, ghost = self.ghosts.popleft()
        while ghost.commands:
            ghost.work()
        if ghost.running:
            ghost.step()
        for report in ghost.reports:
            assert self.core.observe(replica_id, ghost.epoch, report, self.now) == []
        assert self.core.drain_events() == []

    @precondition(lambda self: self.open)
    @rule(data=st.data(), replica_id=IDS, other=st.sampled_from([-1, 10]))
    def words_under_another_epoch_change_nothing(self, data: st.DataObject, replica_id: int, other: int) -> None:
        request_id, index = data.draw(st.sampled_from(sorted(self.open)))
        lie = SequenceProgress(request_id=f"{request_id}-{index}", token_ids=[1], first_index=0, finish_reason="stop")
        report = Progress(sequences=[lie], stats=ReplicaStats(num_running=99))
        assert self.core.observe(replica_id, self.replicas[replica_id].epoch + other, report, self.now) == []
        assert self.core.drain_events() == [] and self.core.stats().num_running != 99

    @precondition(lambda self: self.count % 3 == 2)
    @rule(replica_id=IDS)
    def a_replica_dies_and_is_started_again(self, replica_id: int) -> None:
        replica = self.replicas[replica_id]
        # What it reported has arrived or not; what is under way to it is lost.
        told = {
            s.sequence_id
            for r in self.core._requests.on_replica(replica_id)
            for s in r.unfinished.values()
            if s.started
        }
        self.hits.update({sequence_id.rpartition("-")[0] for sequence_id in told})
        self._die(replica_id)
        assert self.core.lose_replica(replica_id, replica.epoch, "again", self.now) == []

    @rule(replica_id=IDS)
    def a_link_fails_and_the_replica_goes_on(self, replica_id: int) -> None:
        """What was under way either way is lost, and nobody is to blame."""
        replica, known = self.replicas[replica_id], self.core.replicas[replica_id]
        if known.leaves or not known.is_alive:
            return
        self.ghosts.append((replica_id, copy.deepcopy(replica)))
        beat = Heartbeat(busy_seconds=0.0, is_orphaned=True)
        self._send(self.core.observe(replica_id, replica.epoch, beat, self.now))
        renewed = self.core.replicas[replica_id]
        assert renewed.is_renewed and renewed.epoch > replica.epoch and known.state is ReplicaState.DEAD
        # It is heard again and again until it has become the other.
        renewed.start_deadline = None
        replica.adopted(renewed.epoch)

    @precondition(lambda self: self.leaving)
    @rule()
    def a_drained_replica_ends_and_is_started_again(self) -> None:
        replica_id = self.leaving.pop()
        replica = self.replicas[replica_id]
        while replica.commands:
            replica.work()
        assert replica.is_down and not replica.running
        self._die(replica_id)

    def _die(self, replica_id: int) -> None:
        replica = self.replicas[replica_id]
        self.ghosts.append((replica_id, replica))
        self.leaving.discard(replica_id)
        self._send(self.core.lose_replica(replica_id, replica.epoch, "it died", self.now))
        self._send(self.core.tick(self.now))
        assert self.replicas[replica_id].epoch > replica.epoch

    @rule(replica_id=IDS, restart=st.booleans())
    def drain(self, replica_id: int, restart: bool) -> None:
        others = [r for r in self.core.replicas.ready() if r.replica_id != replica_id]
        try:
            out = self.core.drain_replica(replica_id, self.now, restart=restart)
        except ReplicaStateError:
            is_starting = self.core.replicas[replica_id].state is ReplicaState.STARTING
            assert not others or is_starting or replica_id in self.leaving
            return
        assert others
        self._send(out)

    @rule(replica_id=IDS)
    def resume(self, replica_id: int) -> None:
        try:
            out = self.core.resume_replica(replica_id, self.now)
        except ReplicaStateError:
            assert self.core.replicas[replica_id].state is not ReplicaState.DRAINING or replica_id in self.leaving
            return
        self._send(out)

    @invariant()
    def the_queue_is_bounded(self) -> None:
        assert self.core.num_unfinished == len(self.open) <= NUM_REPLICAS * MAX_NUM_SEQS + MAX_QUEUE

    @invariant()
    def what_waits_for_a_replica_to_listen_takes_room(self) -> None:
        waiting = sum(isinstance(each, AddRequest) for one in self.replicas.values() for each in one.commands)
        assert waiting <= self.core.room.num_held

    @invariant()
    def the_books_are_right(self) -> None:
        assert self.core.adapters.pinned == self.pinned <= self.named.keys()
        coming = Counter(reload.epoch for reload in self.core._calls._reloads.values())
        assert {r.epoch: len(r.coming) for r in self.core.replicas.all_alive() if r.coming} == coming
        for replica in self.core.replicas.ready():
            contents = {spec.content_hash for spec in self.core.adapters.specs()}
            lacking = {each for each in contents if not self.core._calls.holds(replica, each)}
            assert lacking == contents & (replica.coming | replica.refused.keys()), "what it lacks is known"
            assert replica.refused.keys() <= contents
        for replica_id in self.replicas:
            known = self.core._requests.prefixes.num_known(replica_id)
            assert known <= NUM_BLOCKS and (not known or self.core.replicas[replica_id].model)
            backlog, records = self.core._requests.backlog(replica_id), self.core._requests.on_replica(replica_id)
            sequences = [sequence for record in records for sequence in record.unfinished.values()]
            assert backlog.num_sequences == len(sequences)
            assert backlog.prefill_tokens == sum(sequence.owed_prefill for sequence in sequences)
            assert backlog.output_tokens == pytest.approx(sum(sequence.owed_output for sequence in sequences))
            assert set(backlog.adapters) == {record.content_hash for record in records if record.content_hash}

    @invariant()
    def nobody_waits_for_a_turn_that_has_come(self) -> None:
        turns, moves = self.core.handover._turns, self.core.handover._moves.values()
        used = Counter(move.source.epoch for move in moves)
        num_bytes: Counter[int] = Counter()
        for move in moves:
            num_bytes[move.source.epoch] += move.room
        assert turns._used == used and all(number <= turns._most for number in used.values())
        assert turns._num_bytes == num_bytes
        # One alone may have grown while it waited.
        assert all(number <= turns._most_bytes or used[epoch] == 1 for epoch, number in num_bytes.items())
        waiting = [(old.epoch, left[0], old) for old, left in self.core._placer._leaving]
        for epoch, wishes in turns._waiting.items():
            first = next(iter(wishes.values()))
            waiting.append((epoch, first.record, first.source))
        if self.core._placer.goes_on_at <= self.now:
            return
        for epoch, record, source in waiting:
            assert used[epoch] == turns._most or num_bytes[epoch] + kv_bytes(record, source) > turns._most_bytes

    def teardown(self) -> None:
        """Whatever was accepted ends; then every replica holds what has a name, and pins what is pinned."""
        for replica_id in self.replicas:
            self.resume(replica_id)
        while self.leaving:
            self.a_drained_replica_ends_and_is_started_again()
        for _ in range(40):
            if self.core.next_deadline() <= self.now:
                self._send(self.core.tick(self.now))
            for replica_id in self.replicas:
                self.everything_under_way_arrives(replica_id)
                self.replicas[replica_id].step()
                self.deliver_all(replica_id)
        assert not self.open and not self.loading and not self.core.num_unfinished
        assert self.core.handover.next_deadline() == math.inf and not self.core.handover._turns._waiting
        for replica in self.replicas.values():
            assert replica.held == set(self.named.values())
            assert not replica.running and not replica.exports and not replica.copying
            assert replica.pins == {name: self.named[name] for name in self.pinned}


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestRandomEvents = Machine.TestCase


@pytest.mark.parametrize("kind", KINDS)
def test_traffic(kind: MigrationKind) -> None:
    """The same machine where much runs and plans come all the time: few random orders of all events get there."""
    moved = 0
    for seed in range(40):
        rng = random.Random(seed)
        machine = Machine()
        machine.begin(kind, loaded=True, at_once=1 + seed % 3)
        for _ in range(250):
            _happen(machine, rng)
            machine.the_queue_is_bounded()
            machine.the_books_are_right()
            machine.nobody_waits_for_a_turn_that_has_come()
        view = machine.core.migration.view()
        assert view is not None
        moved += view.moves.get("recompute", 0)
        machine.teardown()
    assert moved > 100 if kind == "dlora" else not moved


def _happen(machine: Machine, rng: random.Random) -> None:
    replica_id = rng.randrange(NUM_REPLICAS)
    match rng.choices(range(11), (6, 4, 3, 4, 4, 1, 1, 2, 0.3, 0.3, 0.5))[0]:
        case 0:
            machine.submit(rng.randrange(1, 3), rng.randrange(2, 8), rng.choice([None, "red", "blue"]))
        case 1:
            machine.everything_under_way_arrives(replica_id)
        case 2:
            machine.replica_steps(replica_id)
        case 3:
            machine.time_passes(rng.choice([0.2, 1.5, 12.0]))
        case 4 if machine.plan_is_due:
            machine.make_plan(lambda most: rng.randint(0, most))
        case 4 if machine.moves:
            machine.some_of_a_plan_is_carried_out(rng.randrange(1, 4))
        case 4 if machine.searches:
            machine.a_search_ends(rng.random() < 0.3)
        case 5:
            machine.load(rng.choice(["red", "blue"]), rng.choice(["one", "two", "broken"]), True, None)
        case 6 if machine.core.replicas[replica_id].state is not ReplicaState.DEAD:
            machine.a_replica_dies_and_is_started_again(replica_id)
        case 7:
            machine.replica_takes_commands(replica_id, 2)
        case 8:
            machine.drain(replica_id, rng.random() < 0.5)
        case 9:
            machine.resume(replica_id)
        case 10:
            machine.a_link_fails_and_the_replica_goes_on(replica_id)
