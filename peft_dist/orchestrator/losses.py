"""What follows when a replica is lost: for its requests, for loads, and for whoever comes in its place."""

from __future__ import annotations

import math

from peft_dist.core.errors import EngineDeadError
from peft_dist.core.messages import AbortRequest, Fence, Shutdown
from peft_dist.orchestrator.adapter_calls import AdapterCalls, to
from peft_dist.orchestrator.endings import Endings
from peft_dist.orchestrator.events import Event, ReplicaLost, ReplicaRenewed
from peft_dist.orchestrator.handover import Handover
from peft_dist.orchestrator.lifecycle import Lifecycle
from peft_dist.orchestrator.placer import Placer
from peft_dist.orchestrator.records import Fault, Outgoing, Replica, RequestRecord
from peft_dist.orchestrator.replicas import ReplicaTable
from peft_dist.orchestrator.requests import RequestTable

# Until somebody has told it what it is.
_FIRST_WORD_SECONDS = 10.0
# After one that had joined was lost: for whoever started it to let it join again, or for another one.
_JOIN_SECONDS = 30.0
_MAX_LISTED = 8


class Losses:
    """Gives replicas up, and lets others go on. Calls return commands to send."""

    def __init__(
        self,
        requests: RequestTable,
        replicas: ReplicaTable,
        calls: AdapterCalls,
        placer: Placer,
        handover: Handover,
        lives: Lifecycle,
        endings: Endings,
        events: list[Event],
    ) -> None:
        self._requests, self._replicas, self._calls = requests, replicas, calls
        self._placer, self._handover, self._lives = placer, handover, lives
        self._endings, self._events = endings, events
        # Until when what no replica can go on with waits for one to join, and what became of the last one.
        self._joins_until = -math.inf
        self._last_guest: EngineDeadError | None = None
        # To whoever could not load an adapter, of the requests that wait for another replica now.
        self._left: list[Outgoing] = []

    def lose(self, replica: Replica, fault: Fault, now: float) -> list[Outgoing]:
        """Give a replica up. One whose connection alone failed goes on as another incarnation, with what it holds."""
        error, was_asked = EngineDeadError(fault.reason), self._lives.was_told_to_end(replica)
        is_renewed = fault.by_link and self._lives.can_renew(replica)
        farewell = (
            Fence(reason=fault.reason, is_final=fault.is_misfit)
            if replica.is_guest and not replica.leaves
            else Shutdown()
        )
        self._replicas.mark_dead(replica, error)
        if is_renewed:
            # Before its requests are looked at: they may wait for it.
            self._replicas.renew(replica, start_deadline=now + _FIRST_WORD_SECONDS)
        else:
            self._lives.plan_restart(replica, now, was_asked=was_asked)
        moves, brought = self._handover.lose(replica, now)
        out = [] if is_renewed else [to(replica, farewell)]
        out += [*self._calls.lose(replica, error), *moves]
        by_death = not (was_asked or fault.by_link)
        guilty = self._placer.orphan(replica, now, by_death=by_death, brought=brought, is_unseen=fault.is_unseen)
        if guilty is not None:
            out += self._placer.stop(guilty, *guilty.unfinished.values())
            twice = "Another replica was lost with this request before: it is not tried again."
            self._endings.fail([guilty], EngineDeadError(f"{fault.reason.rstrip('.')}. {twice}"))
        if replica.is_guest and not is_renewed and not fault.is_misfit:
            self._joins_until, self._last_guest = now + _JOIN_SECONDS, error
        out += self.place_waiting(now, error)
        if is_renewed:
            self._events.append(ReplicaRenewed(replica.replica_id, replica.epoch, error))
            return out
        self._events.append(ReplicaLost(replica.replica_id, error, fault.hangs, was_asked))
        if replica.is_guest:
            self._replicas.remove(replica)
        return out

    def go_elsewhere(self, record: RequestRecord, replica: Replica, problem: str, now: float) -> bool:
        """A replica cannot load a request's adapter: another one that can goes on with it, if there is one.

        It waits to be placed then, and the replica gets no more of that adapter until it has taken it anew. That goes
        on as often as there are replicas: what takes an adapter anew may fail to load it again.
        """
        record.num_lacks += 1
        if record.adapter is None or record.num_lacks > len(self._replicas.ready()):
            return False
        ids = [sequence.sequence_id for sequence in record.unfinished.values()]
        if not self._placer.leave(record, replica, now):
            return False
        # One of its sequences may have been on its way there when the others failed.
        self._left.append(to(replica, AbortRequest(request_ids=ids)))
        self._calls.lack(replica, record.adapter, problem, now)
        return True

    def place_waiting(self, now: float, error: EngineDeadError | None = None) -> list[Outgoing]:
        """Place what waits (some of it, where it is much), and fail what waits in vain.

        ``error``: What has just ended a replica.

        Soon after one that had joined was lost, nothing is: another one could go on with it."""
        if not self._requests.has_unplaced:
            return []
        out, self._left = self._left, []
        out += self._placer.place_waiting(now)
        # While there is more to place, who waits in vain is looked for once: when the reason is at hand.
        if now < self._joins_until or (error is None and self._placer.places_at <= now):
            return out
        hopeless = [record for record in self._requests.unplaced() if self._placer.is_hopeless(record)]
        for record in hopeless:
            self._endings.fail([record], EngineDeadError(self.why_in_vain(record, error)))
        return out

    def why_in_vain(self, record: RequestRecord, error: EngineDeadError | None = None) -> str:
        """Why a request waits for a replica in vain, and what to do. ``error``: What has just ended one."""
        ready, content = self._replicas.ready(), record.content_hash
        if not ready:
            return str(error or self._replicas.health_error())
        if record.adapter is None or any(self._calls.holds(replica, content) for replica in ready):
            return "Replicas were lost with it, and such requests are tried one after another: send it again later."
        tried: dict[str, list[int]] = {}
        for replica in ready:
            is_coming, is_refused = content in replica.coming, content in replica.refused
            how = "is on its way to" if is_coming else "was refused by" if is_refused else "is not on"
            tried.setdefault(how, []).append(replica.replica_id)
        where = ", ".join(f"{how} {'replicas' if ids[1:] else 'replica'} {_list(ids)}" for how, ids in tried.items())
        remedy = "load it in place, or send the request again later"
        if not self._calls.is_named(content):
            remedy = "it was unloaded or replaced, so send the request again with an adapter that is served"
        first = "" if error is None else f"{str(error).rstrip('.')}. "
        return f"{first}Adapter {record.adapter.name!r} {where}: {remedy}."

    def tick(self, now: float) -> list[Outgoing]:
        """Place what was left, and fail what has waited in vain for a replica to join."""
        if self._last_guest is None or now < self._joins_until:
            return self.place_waiting(now) if self._placer.places_at <= now else []
        error = EngineDeadError(f"{self._last_guest} No other one joined within {_JOIN_SECONDS:g} s.")
        self._last_guest = None
        return self.place_waiting(now, error)

    def next_deadline(self) -> float:
        """When ``tick`` has something to do; infinity for never."""
        if not self._requests.has_unplaced:
            # Those that were left have gone otherwise: clients left, or nobody could ever go on with them.
            return math.inf
        return min(self._placer.places_at, math.inf if self._last_guest is None else self._joins_until)


def _list(ids: list[int]) -> str:
    more = len(ids) - _MAX_LISTED
    return ", ".join(map(str, ids[:_MAX_LISTED])) + (f" and {more} more" if more > 0 else "")
