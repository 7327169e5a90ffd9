"""When a service has started, and how it hears replicas of an earlier life."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
import zmq

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import EngineDeadError
from peft_dist.core.joining import Join, Welcome
from peft_dist.core.messages import AnyReport, Heartbeat, Ping, Shutdown, decode_command, encode_report
from peft_dist.core.succession import Adopt, Identify, Identity, first_number
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.events import ReplicaLost
from peft_dist.orchestrator.guests import Invitation
from peft_dist.orchestrator.link import Link, Received
from peft_dist.orchestrator.service import EngineService
from peft_dist.orchestrator.startup import Startup
from peft_dist.orchestrator.survivors import Survivors

ERROR = EngineDeadError("it died")
EARLIER, EARLIEST = first_number(3), first_number(2)
IDENTITY = Identity(guest=None, attempt=0, host="h", engine=EngineConfig(model="m"), replica_factory="f")


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def is_done(startup: Startup) -> bool:
    return startup.grace == 9.0


def test_a_first_start_waits_for_all_and_fails_with_one() -> None:
    async def work() -> None:
        startup = Startup(2, [], 9.0)
        startup.ready(0, 1, adopted=False)
        assert startup.grace == 1.0
        startup.ready(1, 2, adopted=False)
        await startup.wait()
        assert is_done(startup)
        startup = Startup(2, [], 9.0)
        startup.lost(1, ERROR)
        with pytest.raises(EngineDeadError):
            await startup.wait()

    run(work())


def test_what_an_earlier_life_left_does_not_wait_for_what_is_missing() -> None:
    async def work() -> None:
        startup = Startup(3, {0, 1}, 9.0)
        # A new one that cannot start is no reason to end those that can serve.
        startup.lost(2, ERROR)
        startup.ready(1, 1, adopted=True)
        assert not is_done(startup), "the other one may remember more names"
        startup.ready(0, 2, adopted=True)
        assert is_done(startup)
        # One that came is enough where the other does not.
        startup = Startup(2, {0, 1}, 9.0)
        startup.ready(1, 1, adopted=True)
        await startup.wait()

    run(work())


def test_where_nothing_is_left_after_all_it_is_as_a_first_start() -> None:
    async def work() -> None:
        startup = Startup(1, {0}, 9.0)
        startup.lost(0, ERROR)
        assert not is_done(startup)
        startup.ready(0, 1, adopted=False)
        assert is_done(startup)
        startup = Startup(2, {0}, 9.0)
        startup.lost(1, ERROR)
        startup.lost(0, ERROR)
        with pytest.raises(EngineDeadError):
            await startup.wait()

    run(work())


class Wire:
    """Takes the place of a link: what was answered, in order."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, object, int]] = []

    def answer(self, receiver: bytes, command: object, epoch: int = 0) -> None:
        self.sent.append((receiver, command, epoch))

    def take(self) -> list[tuple[bytes, object, int]]:
        sent, self.sent = self.sent, []
        return sent


class Scene:
    def __init__(self) -> None:
        self.now = 100.0
        self.wire = Wire()
        self.core = Orchestrator(OrchestratorOptions(first_number=first_number(4)))
        self.survivors = Survivors(self.core, self.wire, lambda: self.now, 300.0)  # type: ignore[arg-type]

    def hear(self, replica_id: int, report: AnyReport, epoch: int = EARLIER) -> list[tuple[bytes, object, int]]:
        name = f"{replica_id}.{epoch}.side".encode()
        self.survivors.hear(Received(name, replica_id, epoch, encode_report(report, epoch)))
        return self.wire.take()


def test_a_survivor_is_asked_who_it_is_and_adopted_under_a_new_epoch() -> None:
    scene, beat = Scene(), Heartbeat(busy_seconds=0.0)
    replica, name = scene.survivors.expect(0), f"0.{EARLIER}".encode()
    assert scene.core.next_deadline() == 110.0
    assert scene.hear(0, beat) == [(name, Identify(), EARLIER)]
    assert scene.hear(0, beat) == [], "it was asked just now"
    scene.now += 1.0
    assert len(scene.hear(0, beat)) == 1
    assert scene.core.next_deadline() == 111.0, "it may be loading its model, but says so"
    [(receiver, adopt, epoch)] = scene.hear(0, IDENTITY)
    assert (receiver, epoch) == (name, EARLIER) and isinstance(adopt, Adopt) and adopt.pid
    assert (adopt.replica_id, adopt.incarnation) == (0, replica.epoch)
    # The answer may have been lost; who asks again is the same replica.
    assert scene.hear(0, IDENTITY) == [(name, adopt, EARLIER)]


def test_a_survivor_that_falls_silent_or_loads_for_ever_is_given_up() -> None:
    scene, beat = Scene(), Heartbeat(busy_seconds=0.0)
    replica = scene.survivors.expect(0)
    for second in range(300):
        scene.now = 100.0 + second
        scene.hear(0, beat)
        assert not scene.core.tick(scene.now) and replica.is_alive
    # 300 seconds is what it has to become ready; and from its last word on it has 10.
    assert scene.core.next_deadline() == 400.0
    scene.core.tick(400.0)
    assert not replica.is_alive


class _Process:
    """Of a replica that never says anything by itself."""

    def __init__(self) -> None:
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        return await asyncio.shield(self._end)

    async def stop(self, grace: float) -> None:
        self.kill()

    def kill(self) -> None:
        if not self._end.done():
            self._end.set_result(0)


class _Launcher:
    """Takes a moment, in which whatever has been sent is heard."""

    async def start(self, endpoint: str, replica_id: int, epoch: int) -> _Process:
        for _ in range(50):
            await asyncio.sleep(0.002)
        return _Process()


@contextlib.contextmanager
def dealer(name: str, endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    context = zmq.Context()
    socket = context.socket(zmq.SocketType.DEALER)
    socket.set(zmq.SocketOption.IDENTITY, name.encode())
    socket.connect(endpoint)
    try:
        yield socket
    finally:
        context.destroy(linger=0)


async def answer(socket: zmq.Socket[bytes]) -> object:
    while not socket.poll(0):
        await asyncio.sleep(0.005)
    return decode_command(socket.recv()).message


def test_who_was_left_is_known_while_what_is_missing_is_started() -> None:
    async def work() -> None:
        link = Link.local()
        with dealer(f"1.{EARLIER}", link.endpoint) as survivor:
            survivor.send(encode_report(Heartbeat(busy_seconds=0.0, is_orphaned=True), EARLIER))
            service = EngineService(_Launcher(), OrchestratorOptions(), num_replicas=2, link=link, left={1: _Process()})
            starting = asyncio.create_task(service.start())
            assert await answer(survivor) == Identify()
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await service.stop()

    run(work())


def test_whoever_wants_to_join_at_the_start_takes_no_id_of_this_servers_own() -> None:
    async def work() -> None:
        invitation = Invitation("tcp://127.0.0.1:0", EngineConfig(model="m"), "module:factory")
        service = EngineService(_Launcher(), OrchestratorOptions(), num_replicas=2, invitation=invitation)
        assert service.guests is not None
        with dealer("join.early", service.guests.endpoint) as guest, dealer("nobody", service.guests.endpoint) as odd:
            guest.send(encode_report(Join(host="h", attempt=0, is_heard=True), 0))
            starting = asyncio.create_task(service.start())
            welcome = await answer(guest)
            assert isinstance(welcome, Welcome) and welcome.replica_id == 2 and not starting.done()
            # What nobody can be answered by ends nobody.
            odd.send(b"hello")
            odd.send_multipart([b"more", b"than", b"one"])
            guest.send(encode_report(Join(host="h", attempt=0, is_heard=True), 0))
            assert await answer(guest) == welcome
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await service.stop()

    run(work())


def test_one_that_was_answered_and_did_not_hear_it_is_no_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        invitation = Invitation("tcp://127.0.0.1:0", EngineConfig(model="m"), "module:factory")
        service = EngineService(_Launcher(), OrchestratorOptions(), num_replicas=0, invitation=invitation)
        assert service.guests is not None
        starting = asyncio.create_task(service.start())
        with dealer("join.somebody", service.guests.endpoint) as guest:

            async def ask(*, is_heard: bool) -> object:
                guest.send(encode_report(Join(host="there", attempt=0, is_heard=is_heard), 0))
                return await answer(guest)

            assert await ask(is_heard=False) == Ping() and not service.replicas()
            first = await ask(is_heard=True)
            assert isinstance(first, Welcome) and [view.state for view in service.replicas()] == ["starting"]
            # The answer may have been late: it is the same one.
            assert await ask(is_heard=False) == await ask(is_heard=True) == first
            monkeypatch.setattr("peft_dist.orchestrator.guests.UNREACHED_SECONDS", 0.0)
            assert await ask(is_heard=False) == Ping() and not service.replicas()
            again = await ask(is_heard=True)
            assert isinstance(again, Welcome) and again.incarnation > first.incarnation
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await service.stop()

    run(work())


def test_whoever_is_not_expected_is_told_to_end() -> None:
    scene, beat = Scene(), Heartbeat(busy_seconds=0.0)
    scene.survivors.expect(0)
    scene.hear(0, beat)
    assert scene.hear(1, beat) == [(f"1.{EARLIER}".encode(), Shutdown(), EARLIER)]
    assert scene.hear(0, beat, EARLIEST) == [(f"0.{EARLIEST}".encode(), Shutdown(), EARLIEST)]
    replica = scene.core.replicas[0]
    scene.core.lose_replica(0, replica.epoch, "it was given up", scene.now)
    assert [command for _, command, _ in scene.hear(0, beat)] == [Shutdown()]


def test_a_survivor_in_a_step_that_does_not_end_is_given_up() -> None:
    scene = Scene()
    scene.survivors.expect(0)
    scene.hear(0, Heartbeat(busy_seconds=59.0))
    assert not scene.core.drain_events()
    scene.hear(0, Heartbeat(busy_seconds=61.0))
    [lost] = scene.core.drain_events()
    assert isinstance(lost, ReplicaLost) and lost.hangs and scene.core.replicas[0].restart_at == scene.now
