"""Loads, unloads and pins on all replicas, and bringing those that start later to what the others hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Set
from typing import Any, NamedTuple

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.errors import AdapterError, PeftDistError
from peft_dist.core.messages import AdapterResult, AnyCommand, LoadAdapter, PinAdapter, Ready, UnloadAdapter
from peft_dist.core.succession import NameAdapters
from peft_dist.orchestrator.adapter_retries import AdapterRetries
from peft_dist.orchestrator.adapters import AdapterRegistry
from peft_dist.orchestrator.events import AdapterLoaded, AdapterRefused, Event, NamesAreKept, Notice
from peft_dist.orchestrator.holdings import Holdings
from peft_dist.orchestrator.records import Outgoing, Replica
from peft_dist.orchestrator.replicas import ReplicaTable


class _Reload(NamedTuple):
    """An adapter on its way to one incarnation of a replica."""

    epoch: int
    spec: AdapterSpec
    pinned: bool


class AdapterCalls:
    """Keeps what replicas hold in step with the registry. Calls return commands to send.

    A load by a user concerns every replica that is ready, and takes effect on all of them or on none. A replica that
    becomes ready later is brought the named adapters one by one, and those that requests use; until it holds one, its
    requests go elsewhere. What it refuses is brought to it again, a few times, while it has a name.
    """

    def __init__(
        self, registry: AdapterRegistry, replicas: ReplicaTable, events: list[Event], first_call: int = 1
    ) -> None:
        self._registry = registry
        self._replicas = replicas
        self._events = events
        self._holdings = Holdings()
        self._next_call = first_call
        self._kept = 0
        # Reloads that were not answered yet.
        self._reloads: dict[int, _Reload] = {}
        self._retries = AdapterRetries()

    def holds(self, replica: Replica, content_hash: str) -> bool:
        """Whether a replica can run requests of a content."""
        return self._holdings.holds(replica.replica_id, content_hash)

    def holders(self, content_hash: str) -> Set[int]:
        """Ids of the replicas that can run requests of a content, not the base."""
        return self._holdings.holders(content_hash)

    def is_named(self, content_hash: str) -> bool:
        """Whether new requests can ask for a content."""
        return self._registry.is_named(content_hash)

    def is_coming(self, replica: Replica, content_hash: str) -> bool:
        """Whether a content that is needed is on its way to a replica, or will be once that is ready."""
        return replica.will_be_ready or content_hash in replica.coming

    def load(self, name: str, path: str, pinned: bool | None, **source: Any) -> tuple[int, list[Outgoing]]:
        """Ask every ready replica; ``pinned`` None: if what it replaces is. ``source`` are fields of LoadAdapter."""
        call_id = self._new_call()
        pin = name in self._registry.pinned if pinned is None else pinned
        command = LoadAdapter(call_id=call_id, name=name, path=path, pinned=pin, **source)
        replicas = self._replicas.ready()
        self._registry.begin_load(command, {replica.replica_id for replica in replicas})
        return call_id, [to(replica, command) for replica in replicas]

    def answered(self, replica: Replica, report: AdapterResult, now: float) -> list[Outgoing]:
        """A replica's answer to a load or unload."""
        if report.spec is not None:
            self._holdings.add(replica.replica_id, report.spec.content_hash)
            replica.refused.pop(report.spec.content_hash, None)
        if report.call_id in self._reloads:
            self._reloaded(replica, report, now)
        elif report.call_id in self._registry.loads_on(replica.replica_id):
            error = report.error or "the replica neither loaded nor refused it"
            return self._settle(report.call_id, replica.replica_id, report.spec or AdapterError(error))
        elif report.error is not None:
            self._events.append(Notice(replica.replica_id, report.error))
        return []

    def take_in(self, replica: Replica, report: Ready) -> list[Outgoing]:
        """What a replica that has become ready has from before: contents, and names where these are the latest ones."""
        for spec in report.contents:
            self._holdings.add(replica.replica_id, spec.content_hash)
        version, out = report.names_version, []
        if self._registry.restore(report.names, version):
            # Those that were ready before remember less.
            for other in (other for other in self._replicas.ready() if other is not replica):
                out += [self._all_names(other), *self._reload(other, self._registry.specs())]
        # The same number may be another life's, from which this one did not go on.
        is_told = version == self._registry.version and report.names == self._registry.named()
        replica.names_version = version if is_told else 0
        return out if is_told else [*out, self._all_names(replica)]

    def _all_names(self, replica: Replica) -> Outgoing:
        names = NameAdapters(version=self._registry.version, given=self._registry.named(), is_whole=True)
        return to(replica, names)

    def welcome(self, replica: Replica) -> list[Outgoing]:
        """Bring all that it lacks, and a name or a request needs, to a replica that can be used from now on."""
        return self._reload(replica, self._registry.wanted())

    def lack(self, replica: Replica, spec: AdapterSpec, problem: str, now: float) -> None:
        """A replica cannot bring a content to its device that it had taken: it is brought it anew, as what it refused.

        Until then its requests go elsewhere. Ignored where that is known.
        """
        if self.holds(replica, spec.content_hash):
            self._holdings.is_unable(replica.replica_id, spec.content_hash)
            self._refuse(replica, spec, problem, self._retries.lacked(replica, spec.content_hash, now))

    def lose(self, replica: Replica, error: PeftDistError) -> list[Outgoing]:
        """A replica is gone: loads go on without it, or fail if it was the last one."""
        self._holdings.lose(replica.replica_id)
        self._retries.lose(replica)
        replica.coming.clear()
        self._reloads = {call: reload for call, reload in self._reloads.items() if reload.epoch != replica.epoch}
        out: list[Outgoing] = []
        for call_id in self._registry.loads_on(replica.replica_id):
            out += self._settle(call_id, replica.replica_id, error, lost=True)
        return out

    def next_deadline(self) -> float:
        """When ``tick`` has something to do; infinity for never."""
        if not self._retries.has_some:
            return math.inf
        return min(map(self._retries.next_at, self._replicas.ready()), default=math.inf)

    def tick(self, now: float) -> list[Outgoing]:
        """Bring what was refused, and may be taken by now. It counts as refused until it is."""
        if now < self.next_deadline():
            return []
        specs = {spec.content_hash: spec for spec in self._registry.specs()}
        due = [(replica, each) for replica in self._replicas.ready() for each in self._retries.take_due(replica, now)]
        return [self._bring(replica, specs[content_hash]) for replica, content_hash in due if content_hash in specs]

    def tidy(self) -> list[Outgoing]:
        """Pins that changed, and drops of what neither a name nor a request needs.

        Nothing is dropped while a load is under way: it may turn out to bring the same content again.
        """
        alive = {r.replica_id: r for r in self._replicas.all_alive() if r.ready_since is not None}
        for replica in alive.values():
            if replica.refused or self._retries.has_some:
                # What nobody can ask for is not missed.
                replica.refused = {each: why for each, why in replica.refused.items() if self._registry.is_named(each)}
                self._retries.keep(replica, replica.refused)
        out: list[Outgoing] = []
        if (renamed := self._registry.take_renamed()) is not None:
            out += [to(replica, renamed) for replica in alive.values()]
        kept = min((replica.names_version for replica in alive.values()), default=self._registry.version)
        if kept > self._kept:
            self._kept = kept
            self._events.append(NamesAreKept(kept))
        for name, content_hash in self._registry.take_repins():
            for replica in alive.values():
                held = content_hash if content_hash and self.holds(replica, content_hash) else None
                out.append(to(replica, PinAdapter(name=name, content_hash=held)))
        if self._registry.is_loading:
            return out
        self._registry.has_unneeded = False
        for content_hash in self._holdings.unneeded(self._registry.needed()):
            for holder in [alive[i] for i in self._holdings.drop(content_hash) if i in alive]:
                out.append(to(holder, UnloadAdapter(call_id=self._new_call(), content_hash=content_hash)))
        return out

    def _settle(
        self, call_id: int, replica_id: int, answer: AdapterSpec | PeftDistError, *, lost: bool = False
    ) -> list[Outgoing]:
        outcome = self._registry.settle(call_id, replica_id, answer, lost=lost)
        if outcome is None:
            return []
        if not isinstance(outcome, AdapterSpec):
            self._events.append(AdapterRefused(call_id, outcome))
            return []
        self._events.append(AdapterLoaded(call_id, outcome))
        # Those that became ready meanwhile were not asked.
        return [out for replica in self._replicas.ready() for out in self._reload(replica, [outcome])]

    def _reload(self, replica: Replica, specs: Iterable[AdapterSpec]) -> list[Outgoing]:
        out: list[Outgoing] = []
        for spec in specs:
            if self.holds(replica, spec.content_hash):
                # Under another name, of which it knows.
                self._registry.repin_if_pinned([spec.name])
                continue
            if spec.content_hash in replica.refused or spec.content_hash in replica.coming:
                continue
            replica.coming.add(spec.content_hash)
            out.append(self._bring(replica, spec))
        return out

    def _bring(self, replica: Replica, spec: AdapterSpec) -> Outgoing:
        command = self._registry.bring_command(spec, self._new_call())
        self._reloads[command.call_id] = _Reload(replica.epoch, spec, command.pinned)
        return to(replica, command)

    def _reloaded(self, replica: Replica, report: AdapterResult, now: float) -> None:
        reload = self._reloads.pop(report.call_id)
        wanted = reload.spec
        replica.coming.discard(wanted.content_hash)
        if reload.pinned:
            self._registry.repin(wanted.name)
        # The name may mean something else by now, and the replica has just pinned what it meant before, or nothing; and
        # other names may mean the same.
        same = [spec.name for spec in self._registry.specs() if spec.content_hash == wanted.content_hash]
        self._registry.repin_if_pinned([wanted.name, *same])
        if self.holds(replica, wanted.content_hash):  # By this, or by a load that came meanwhile.
            return
        problem = report.error or f"{wanted.path} no longer holds what the other replicas loaded"
        # Without a name nobody asks for it again, and whoever did does not wait that long.
        is_final = report.is_final or not self._registry.is_named(wanted.content_hash)
        wait = self._retries.refused(replica, wanted.content_hash, now, is_final=is_final)
        self._refuse(replica, wanted, problem, wait)

    def _refuse(self, replica: Replica, spec: AdapterSpec, problem: str, wait: float | None) -> None:
        replica.refused[spec.content_hash] = problem
        again = "It is not tried again" if wait is None else f"It is tried again in {wait:g} s"
        remedy = "Unload it, or load it in place"
        if not self._registry.is_named(spec.content_hash):
            remedy = "It has no name any more: its requests end where no other replica holds it"
        text = f"adapter {spec.name!r} is not served here: {problem}. {again}. {remedy}"
        self._events.append(Notice(replica.replica_id, text))

    def _new_call(self) -> int:
        call_id, self._next_call = self._next_call, self._next_call + 1
        return call_id


def to(replica: Replica, command: AnyCommand) -> Outgoing:
    """A command for this incarnation of a replica."""
    return Outgoing(replica.replica_id, replica.epoch, command)
