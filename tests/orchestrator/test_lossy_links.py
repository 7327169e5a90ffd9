"""Messages are lost in any pattern, both ways: every request still ends once, with the tokens it would have had.

Whoever lost something goes on as another incarnation, with what it holds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, repeat

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from peft_dist.core.messages import (
    Heartbeat,
    Ping,
    Progress,
    ReplicaStats,
    decode_command,
    encode_report,
)
from peft_dist.core.numbering import UNNUMBERED, Inbox, Outbox
from peft_dist.core.restarts import RestartPolicy
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.succession import Adopt
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.events import (
    ReplicaLost,
    ReplicaRenewed,
    RequestFailed,
    SequenceEvent,
    StartReplica,
)
from peft_dist.orchestrator.hearing import Hearing
from peft_dist.orchestrator.link import Link, Received
from peft_dist.orchestrator.records import Outgoing
from peft_dist.orchestrator.renewals import Renewals
from tests.orchestrator.world import MiniReplica, drawn_token

NUM_TOKENS = 6
RESTART = RestartPolicy(first=0.0, longest=0.0, max_failures=10**6)


class Wire:
    """In the place of a link's socket: what was sent, with the receiver's name."""

    def __init__(self) -> None:
        self.sent: deque[tuple[bytes, bytes]] = deque()

    def get(self, option: int) -> bytes:
        return b"tcp://nowhere"

    def send_multipart(self, parts: list[bytes]) -> None:
        name, data = parts
        self.sent.append((name, data))


class Worker:
    """One incarnation: takes each command at once, and numbers what it says."""

    def __init__(self, replica_id: int, epoch: int) -> None:
        self.replica_id, self.mini = replica_id, MiniReplica(epoch)
        self.inbox, self.outbox = Inbox(), Outbox()

    def hear(self, data: bytes) -> None:
        envelope = decode_command(data)
        if self.mini.is_down or not self.inbox.take(envelope.number):
            return
        if isinstance(envelope.message, Adopt):
            if envelope.message.incarnation != self.mini.epoch and envelope.epoch == self.mini.epoch:
                self.mini.adopted(envelope.message.incarnation)
                self.inbox, self.outbox = Inbox(), Outbox()
        elif isinstance(envelope.message, Ping):
            self.mini.reports.append(Progress(sequences=[], stats=ReplicaStats(), num_taken=self.mini.num_taken))
        else:
            self.mini.commands.append(envelope.message)
            self.mini.work()

    def say(self) -> Iterator[bytes]:
        reports, self.mini.reports = self.mini.reports, deque()
        if self.inbox.missing is not None:
            self.mini.running.clear()
        yield encode_report(Heartbeat(busy_seconds=0.0, missed=self.inbox.missing), self.mini.epoch, UNNUMBERED)
        for report in reports:
            yield encode_report(report, self.mini.epoch, self.outbox.next())


class World:
    """An Orchestrator and its replicas, with a link that loses what ``losses`` says."""

    def __init__(self, num_replicas: int, losses: Iterable[bool]) -> None:
        self.core = Orchestrator(OrchestratorOptions(max_num_seqs=64, seed=3, restart=RESTART))
        self.wire, self.losses, self.now = Wire(), iter(losses), 0.0
        self.link = Link(self.wire, None, lambda: None)  # type: ignore[arg-type]
        self.hearing = Hearing(self.core, self.act, lambda: self.now)
        self.workers = {i: Worker(i, self.core.add_replica(i, 0.0).epoch) for i in range(num_replicas)}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ended: list[tuple[str, int]] = []
        self.num_lost = self.num_renewed = 0
        self.renewals = Renewals(self.core, self.link.answer, lambda: self.now)

    def act(self, commands: list[Outgoing]) -> None:
        for out in commands:
            self.link.send(out)
        for event in self.core.drain_events():
            match event:
                case SequenceEvent(request_id, index, progress):
                    assert progress.error is None
                    drawn = self.tokens.setdefault((request_id, index), [])
                    assert progress.first_index == len(drawn)
                    drawn += progress.token_ids
                    if progress.finish_reason is not None:
                        self.ended.append((request_id, index))
                case RequestFailed(request_id, error):
                    pytest.fail(f"{request_id}: {error}")
                case StartReplica(replica_id, epoch):
                    self.workers[replica_id] = Worker(replica_id, epoch)
                case ReplicaLost():
                    self.num_lost += 1
                case ReplicaRenewed(replica_id, epoch):
                    self.num_renewed += 1
                    self.renewals.begin(self.core.replicas[replica_id], epoch)

    def take(self, worker: Worker, data: bytes) -> None:
        received = Received(b"", worker.replica_id, worker.mini.epoch, data)
        if self.renewals.awaits(received):
            self.act(self.renewals.hear(received))
        else:
            self.hearing.take(worker.replica_id, worker.mini.epoch, data)

    def load(self, name: str) -> None:
        """Give a name to an adapter that all hold from then on."""
        self.act(self.core.load_adapter(name, name)[1])
        while not self.core.adapters.specs():
            self.round()

    def round(self) -> None:
        """What was said arrives or does not, each replica makes a step, and is pinged."""
        self.now += 1.0
        while self.wire.sent:
            name, data = self.wire.sent.popleft()
            worker = self.workers[int(name.partition(b".")[0])]
            if name == f"{worker.replica_id}.{worker.mini.epoch}".encode() and not next(self.losses):
                worker.hear(data)
        for worker in list(self.workers.values()):
            if worker.mini.running:
                worker.mini.step()
            for data in worker.say():
                if not next(self.losses):
                    self.take(worker, data)
        self.act(self.core.tick(self.now))
        for replica in self.core.replicas.all_alive():
            self.link.ping(replica)


@settings(max_examples=150, deadline=None)
@given(losses=st.lists(st.sampled_from([False, False, False, True]), max_size=150))
def test_any_loss_is_noticed_or_harmless(losses: list[bool]) -> None:
    world = World(2, [])
    world.losses = repeat(False)
    world.round()
    assert len(world.core.replicas.ready()) == 2
    world.load("sql")
    world.losses = chain(losses, repeat(False))
    for number in range(6):
        params = SamplingParams(n=1 + number % 2, max_tokens=NUM_TOKENS, seed=number)
        while not world.core.replicas.ready():
            world.round()
        world.act(world.core.submit(NewRequest(f"r{number}", [5], params, ("sql", None)[number % 2]), world.now))
        world.round()
    for _ in range(150):
        if not world.core.num_unfinished:
            break
        world.round()
    assert len(world.ended) == len(set(world.ended)) == 9
    for (request_id, index), tokens in world.tokens.items():
        assert tokens == [drawn_token(int(request_id[1:]), index, draw) for draw in range(NUM_TOKENS)]
    assert any(losses) or not (world.num_lost or world.num_renewed)
    # Only silence, of all its signs of life or of all that it is told to be, makes anybody load its model again.
    assert not world.num_lost or sum(losses) >= 4


@pytest.mark.parametrize("direction", ["up", "down"])
def test_what_is_lost_last_is_missed_by_the_next_ping_or_its_answer(direction: str) -> None:
    world = World(1, repeat(False))
    world.round()
    world.round()
    # In a round: a ping and an AddRequest down; a step and the ping's answer up.
    world.act(world.core.submit(NewRequest("r", [5], SamplingParams(max_tokens=1, seed=4)), world.now))
    # And a sign of life, which has no number.
    lost = [False, True] if direction == "down" else [False, False, False, True, True, True]
    world.losses = chain(lost, repeat(False))
    world.round()
    assert not world.ended and not world.num_renewed
    worker = world.workers[0]
    for _ in range(4):
        world.round()
    assert (world.num_lost, world.num_renewed) == (0, 1) and world.workers[0] is worker
    assert world.tokens == {("r", 0): [drawn_token(4, 0, 0)]}


def test_a_stranger_to_all_numbers_is_taken_in() -> None:
    """Signs of life go another way, and belong to no order."""
    world = World(1, repeat(False))
    world.round()
    world.now = 50.0
    epoch = world.workers[0].mini.epoch
    world.hearing.take(0, epoch, encode_report(Heartbeat(busy_seconds=0.0), epoch))
    assert world.core.replicas[0].last_heard == 50.0


def test_the_last_word_is_heard_whatever_was_lost_before_it() -> None:
    world = World(1, repeat(False))
    world.round()
    world.act(world.core.submit(NewRequest("r", [5], SamplingParams()), world.now))
    world.wire.sent.clear()
    for out in world.core.shut_down():
        world.link.send(out)
    world.core.drain_events()
    world.round()
    assert world.workers[0].mini.is_down


def test_each_incarnation_counts_for_itself() -> None:
    wire = Wire()
    link = Link(wire, None, lambda: None)  # type: ignore[arg-type]
    for replica_id, epoch in ((0, 1), (0, 1), (1, 2), (0, 3), (0, 1), (0, 3)):
        link.send(Outgoing(replica_id, epoch, Ping()))
    numbers = [decode_command(data).number for _, data in wire.sent]
    # Whoever is over is told nothing that counts.
    assert numbers == [1, 2, 1, 1, UNNUMBERED, 2]
