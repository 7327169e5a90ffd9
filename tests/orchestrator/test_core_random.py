"""Any order of events: nothing is lost, everything ends exactly once, nothing stale is believed."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peft_dist.core.errors import AdapterError, EngineDeadError, QueueFullError, UnknownModelError
from peft_dist.core.messages import AddRequest, Progress, ReplicaStats, SequenceProgress
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.records import (
    AdapterLoaded,
    AdapterRefused,
    Outgoing,
    ReplicaLost,
    RequestFailed,
    SequenceEvent,
)
from tests.orchestrator.world import MiniReplica

MAX_NUM_SEQS, MAX_QUEUE = 2, 2
NAMES = st.sampled_from(["red", "blue"])
CONTENTS = st.sampled_from(["one", "two", "broken"])


class Machine(RuleBasedStateMachine):
    """The client's view is kept apart and compared: tokens so far and ends of every accepted request."""

    @initialize()
    def begin(self) -> None:
        self.core = Orchestrator(OrchestratorOptions(MAX_NUM_SEQS, MAX_QUEUE, seed=0))
        self.now = 0.0
        self.count = 0
        self.tokens: dict[tuple[str, int], int] = {}
        self.open: set[tuple[str, int]] = set()
        self.failed: set[str] = set()
        self.named: dict[str, str] = {}
        self.pinned: set[str] = set()
        self.loading: dict[int, tuple[str, str, bool]] = {}
        self._start_replica()

    def _start_replica(self) -> None:
        self.replica = MiniReplica(self.core.add_replica(0, self.now).epoch)
        self._deliver_all()
        self.named.clear()
        self.pinned.clear()

    def _send(self, commands: list[Outgoing]) -> None:
        for out in commands:
            if out.epoch == self.replica.epoch:
                self.replica.commands.append(out.command)

    def _hear(self) -> None:
        for event in self.core.drain_events():
            match event:
                case SequenceEvent(request_id, index, progress):
                    key = (request_id, index)
                    assert key in self.open, "an event of a sequence that had ended"
                    assert progress.first_index == self.tokens[key]
                    self.tokens[key] += len(progress.token_ids)
                    if progress.finish_reason is not None:
                        self.open.remove(key)
                case RequestFailed(request_id, error):
                    assert isinstance(error, EngineDeadError) and request_id not in self.failed
                    keys = {key for key in self.open if key[0] == request_id}
                    assert keys, "a request failed that had ended"
                    self.open -= keys
                    self.failed.add(request_id)
                case AdapterLoaded(call_id, spec):
                    name, path, pinned = self.loading.pop(call_id)
                    assert (spec.name, spec.content_hash) == (name, f"h-{path}")
                    self.named[name] = spec.content_hash
                    (self.pinned.add if pinned else self.pinned.discard)(name)
                case AdapterRefused(call_id, _):
                    del self.loading[call_id]

    @rule(n=st.integers(1, 3), max_tokens=st.one_of(st.none(), st.integers(1, 4)), name=st.one_of(st.none(), NAMES))
    def submit(self, n: int, max_tokens: int | None, name: str | None) -> None:
        self.count += 1
        new = NewRequest(f"r{self.count}", [5] * 10, SamplingParams(n=n, max_tokens=max_tokens), name)
        before = self.core.num_unfinished
        try:
            out = self.core.submit(new, self.now)
        except QueueFullError as error:
            assert before + n > MAX_NUM_SEQS + MAX_QUEUE and error.retry_after >= 1
            return
        except UnknownModelError:
            assert name is not None and name not in self.named
            return
        assert name is None or name in self.named, "an answer from another model"
        adds = [o.command for o in out]
        assert all(isinstance(add, AddRequest) for add in adds)
        assert [add.request_id for add in adds] == [f"{new.request_id}-{i}" for i in range(n)]
        assert len({add.seed for add in adds}) == 1
        assert {add.params.max_tokens for add in adds} == {max_tokens or 10}
        assert {add.content_hash for add in adds} == {self.named[name] if name else None}
        for index in range(n):
            self.open.add((new.request_id, index))
            self.tokens[(new.request_id, index)] = 0
        self._send(out)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data: st.DataObject, whole: bool) -> None:
        request_id, index = data.draw(st.sampled_from(sorted(self.open)))
        self._send(self.core.abort(request_id, self.now, None if whole else index))
        self._hear()
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
        self.loading[call_id] = (name, path, name in self.pinned if pin is None else pin)
        self._send(out)

    @rule(name=NAMES)
    def unload(self, name: str) -> None:
        if name in self.named:
            self._send(self.core.unload_adapter(name))
            del self.named[name]
            self.pinned.discard(name)
            with pytest.raises(UnknownModelError):
                self.core.adapters.resolve(f"__base__:{name}")
        else:
            with pytest.raises(UnknownModelError):
                self.core.unload_adapter(name)

    @precondition(lambda self: self.replica.commands)
    @rule()
    def replica_takes_a_command(self) -> None:
        self.replica.work()

    @precondition(lambda self: self.replica.running)
    @rule()
    def replica_steps(self) -> None:
        self.replica.step()

    @precondition(lambda self: self.replica.commands)
    @rule()
    def everything_under_way_arrives(self) -> None:
        while self.replica.commands or self.replica.reports:
            self._deliver_all()
            if self.replica.commands:
                self.replica.work()

    @precondition(lambda self: self.replica.reports)
    @rule()
    def deliver_a_report(self) -> None:
        self.now += 0.1
        self._send(self.core.observe(0, self.replica.epoch, self.replica.reports.popleft(), self.now))
        self._hear()

    def _deliver_all(self) -> None:
        while self.replica.reports:
            self.deliver_a_report()

    @precondition(lambda self: self.open)
    @rule(data=st.data(), other=st.sampled_from([-1, 1]))
    def stale_words_change_nothing(self, data: st.DataObject, other: int) -> None:
        request_id, index = data.draw(st.sampled_from(sorted(self.open)))
        lie = SequenceProgress(request_id=f"{request_id}-{index}", token_ids=[1], first_index=0, finish_reason="stop")
        report = Progress(sequences=[lie], stats=ReplicaStats(num_running=99))
        assert self.core.observe(0, self.replica.epoch + other, report, self.now) == []
        assert self.core.drain_events() == [] and self.core.stats().num_running != 99

    @precondition(lambda self: self.count % 5 == 4)
    @rule()
    def replica_dies_and_another_starts(self) -> None:
        died = self.replica.epoch
        self.core.lose_replica(0, died, "it died")
        assert self.core.health_error == "it died"
        assert any(isinstance(event, ReplicaLost) for event in self.core._events)
        self._hear()
        assert not self.open and not self.loading
        with pytest.raises(EngineDeadError):
            self.core.submit(NewRequest("dead", [5], SamplingParams()), self.now)
        assert self.core.lose_replica(0, died, "again") == []
        self._start_replica()

    @invariant()
    def the_queue_is_bounded(self) -> None:
        assert self.core.num_unfinished == len(self.open) <= MAX_NUM_SEQS + MAX_QUEUE

    @invariant()
    def pins_are_of_names(self) -> None:
        assert self.core.adapters.pinned == self.pinned <= self.named.keys()

    def teardown(self) -> None:
        """Whatever was accepted ends; then the replica holds what has a name, and pins what is pinned."""
        for _ in range(30):
            while self.replica.commands:
                self.replica.work()
            self.replica.step()
            self._deliver_all()
        assert not self.open and not self.loading and not self.core.num_unfinished
        assert self.replica.held == set(self.named.values())
        assert self.replica.pins == {name: self.named[name] for name in self.pinned}


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestRandomEvents = Machine.TestCase
