"""The lives of replicas: who is late, silent, to be started again, or being drained."""

from __future__ import annotations

import math

from peft_dist.core.errors import PeftDistError, ReplicaStateError, UnknownReplicaError
from peft_dist.core.messages import Heartbeat, Ready
from peft_dist.core.succession import KeepDrained
from peft_dist.orchestrator.events import DrainIsKept, Event, Notice, ReplicaDrained
from peft_dist.orchestrator.options import OrchestratorOptions
from peft_dist.orchestrator.records import Fault, Outgoing, Replica, ReplicaState
from peft_dist.orchestrator.replicas import ReplicaTable

_DRAINED = (ReplicaState.DRAINING, ReplicaState.DRAINED)
_SERVING = (ReplicaState.READY, *_DRAINED)
_GUESTS_SILENCE = 10.0


class Lifecycle:
    """Decides from the table of replicas and the options; changes nothing but what a replica's life is about.

    Attributes:
        is_stopping: Nothing is admitted any more, and whoever dies is not started again.
    """

    def __init__(self, replicas: ReplicaTable, options: OrchestratorOptions) -> None:
        self._replicas = replicas
        self._options = options
        self._restarts = options.restart
        self._is_over = False
        self.is_stopping = False

    # Deadlines

    def lost_by(self, now: float) -> list[tuple[Replica, Fault]]:
        """Replicas that missed a deadline, and why they are given up."""
        late = self._replicas.late(now)
        # One of an earlier life that says nothing is no slow start.
        lost = [(r, Fault(f"Replica {r.replica_id} was not ready in time.", hangs=r.is_survivor)) for r in late]
        for replica in self._replicas.all():
            if self._silence_ends(replica) <= now:
                silence = f"{now - replica.last_heard:.1f} s"
                reason = f"Replica {replica.replica_id} has been silent for {silence}."
                is_unseen = replica.is_guest or self._options.by_network
                lost.append((replica, Fault(reason, hangs=True, is_unseen=is_unseen)))
        return lost

    def due(self, now: float) -> list[Replica]:
        """Dead replicas that are to be started again by now."""
        return [r for r in self._replicas.all() if r.restart_at is not None and r.restart_at <= now]

    def next_deadline(self) -> float:
        """When ``lost_by`` or ``due`` may next find something, if nothing is heard until then."""
        times, is_watched = [], self._options.heartbeat_timeout is not None
        for replica in self._replicas.all():
            if is_watched or replica.is_guest:
                times.append(self._silence_ends(replica))
            if replica.restart_at is not None:
                times.append(replica.restart_at)
            if replica.start_deadline is not None:
                times.append(replica.start_deadline)
        return min(times, default=math.inf)

    def find_fault(self, replica: Replica, beat: Heartbeat) -> Fault | None:
        """Why a replica is to be given up by what it says of itself; None: it is well."""
        name = f"Replica {replica.replica_id}"
        if beat.is_orphaned:
            # Its words come here, and what it is told does not reach it.
            return Fault(f"{name} heard nothing of this server for too long.", by_link=True)
        if beat.missed is not None:
            return Fault(
                f"{name} lost its connection, and commands {beat.missed[0]} to {beat.missed[1]} with it.", by_link=True
            )
        limit = self._options.step_timeout
        if limit is not None and beat.busy_seconds > limit:
            return Fault(f"{name} has been in one step for {beat.busy_seconds:.0f} s.", hangs=True)
        return None

    def excuse_silence(self, now: float) -> None:
        """Count nobody's silence so far: it was this process that did not listen."""
        for replica in self._replicas.all_alive():
            replica.last_heard = now

    def plan_restart(self, replica: Replica, now: float, *, was_asked: bool) -> None:
        """Note when a replica that has just died is started again; at once if it was asked to end."""
        policy = self._restarts
        if self.is_stopping:
            return
        if replica.is_survivor and not replica.is_renewed and not replica.is_guest and not self._is_over:
            # It was never this life's: in its place comes the one that would have been started without it.
            replica.restart_at = now
            return
        if policy is None or replica.is_guest:
            return
        if was_asked:
            replica.num_failures, replica.restart_at = 0, now
            return
        served = 0.0 if replica.ready_since is None else now - replica.ready_since
        replica.num_failures = policy.failures(replica.num_failures, served)
        wait = policy.wait(replica.num_failures)
        replica.restart_at = None if wait is None else now + wait

    def stop_restarts(self) -> None:
        """What is dead, or dies from now on, stays dead."""
        self._restarts = None
        self._is_over = True
        for replica in self._replicas.all():
            replica.restart_at = None

    def _silence_ends(self, replica: Replica) -> float:
        """When a replica that says nothing will be lost; one that loads its model may be silent."""
        # Of one that joined, silence is all that would ever be noticed.
        limit = self._options.heartbeat_timeout or (_GUESTS_SILENCE if replica.is_guest else None)
        return math.inf if limit is None or replica.state not in _SERVING else replica.last_heard + limit

    # Draining

    def drain(self, replica_id: int, *, leave: bool) -> Replica:
        """Let a replica take no more requests.

        Raises:
            UnknownReplicaError, ReplicaStateError: there is no such replica, it cannot be spared, or it is to ``leave``
                already, and now is not to.
        """
        replica = self._find(replica_id, *_SERVING)
        if replica.leaves and not leave:
            # Somebody counts on its coming back, or has been told that it goes.
            then = "to leave" if replica.is_guest else "to be restarted"
            raise ReplicaStateError(
                f"replica {replica_id} drains {then}: POST /admin/resume/{replica_id} ends that, then drain it again"
            )
        goes = leave and replica.is_guest
        if not goes and not any(other is not replica for other in self._replicas.ready()):
            raise ReplicaStateError(f"replica {replica_id} is the only one that serves: wait until another is ready")
        if leave and not goes:
            self.check_restarts()
        self._replicas.enter(replica, ReplicaState.DRAINING)
        replica.leaves, replica.stays_drained = leave, not leave
        return replica

    def check_restarts(self) -> None:
        """Raises ReplicaStateError where what ends stays dead."""
        if self._restarts is None:
            raise ReplicaStateError("replicas are not started again here: serve with --restart, or drain without it")

    def keep_drained(self, replica: Replica, report: Ready, events: list[Event]) -> list[Outgoing]:
        """Let one that has become ready be drained if it was, in an earlier life of the orchestrator or of its own."""
        number, since = replica.replica_id, None
        # What it was told last may be what was lost; who was started anew was told nothing.
        is_told = replica.is_renewed or replica.stays_drained
        if replica.stays_drained and not replica.is_renewed:
            since = "it died"
        elif report.is_drained and not is_told:
            since, replica.stays_drained = "this server started", True
        if since is not None:
            text = f"was drained before {since}, and still is: POST /admin/resume/{number} ends that"
            events.append(Notice(number, text))
        if replica.stays_drained:
            self._replicas.enter(replica, ReplicaState.DRAINED)
            # Whoever asked for it may wait still.
            events.append(ReplicaDrained(number, leaves=False))
        return [self.tell_drained(replica, is_drained=replica.stays_drained)] if is_told else []

    def tell_drained(self, replica: Replica, *, is_drained: bool) -> Outgoing:
        """Have a replica remember that it is drained, or is not."""
        replica.num_drains_told += 1
        return Outgoing(replica.replica_id, replica.epoch, KeepDrained(is_drained=is_drained))

    def hear_drained(self, replica: Replica, events: list[Event]) -> None:
        """A replica said that it remembers what it was told."""
        replica.num_drains_kept += 1
        if replica.num_drains_kept == replica.num_drains_told:
            events.append(DrainIsKept(replica.replica_id))

    def can_renew(self, replica: Replica) -> bool:
        """Whether a replica whose connection failed may go on as another incarnation: it is to stay, and so is this
        process."""
        return not replica.leaves and not self._is_over

    def resume(self, replica_id: int) -> Replica:
        """Let a draining or drained replica take requests again.

        Raises:
            UnknownReplicaError, ReplicaStateError: there is no such replica, or it does not drain (any more).
        """
        coming = self._replicas.get(replica_id)
        if coming is not None and coming.stays_drained and coming.will_come:
            coming.stays_drained = False
            return coming
        replica = self._find(replica_id, *_DRAINED)
        self._replicas.enter(replica, ReplicaState.READY)
        replica.leaves = replica.stays_drained = False
        return replica

    def check_drained(self, replica_id: int) -> None:
        """Raises ReplicaStateError where a replica that was drained, not to be restarted, is not any more."""
        replica = self._replicas.get(replica_id)
        if replica is None or not replica.stays_drained:
            became = "was resumed" if replica is not None and replica.state is ReplicaState.READY else "is restarted"
            raise ReplicaStateError(f"replica {replica_id} {became} since: drain it again once it serves")
        if replica.state not in _DRAINED and not replica.is_unreached:
            raise self.lost_draining(replica_id, replica.error)

    def lost_draining(self, replica_id: int, error: PeftDistError | None) -> ReplicaStateError:
        """What is told to whoever wanted a replica drained, and it has died."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            then = "it had joined, and has gone"
        elif not replica.will_come:
            then = "it is not started again"
        elif replica.stays_drained:
            then = f"it is started again, and stays drained until POST /admin/resume/{replica_id}"
        else:
            then = "it is started again, as any that dies"
        return ReplicaStateError(f"replica {replica_id} was lost as it drained ({str(error).rstrip('.')}): {then}")

    def was_told_to_end(self, replica: Replica) -> bool:
        """Whether it was drained and is on its way out; what ends before that has died."""
        return replica.leaves and replica.state is ReplicaState.DRAINED

    def was_drained(self, replica: Replica) -> bool:
        """Whether it takes no requests because somebody said so."""
        return replica.state in _DRAINED

    def drained(self, replica: Replica) -> None:
        """A draining replica has no request left."""
        self._replicas.enter(replica, ReplicaState.DRAINED)

    def _find(self, replica_id: int, *states: ReplicaState) -> Replica:
        replica = self._replicas.get(replica_id)
        if replica is None:
            ids = ", ".join(str(other.replica_id) for other in self._replicas.all())
            raise UnknownReplicaError(f"There is no replica {replica_id}: there are {ids}.")
        if replica.state not in states:
            wanted = " or ".join(state.value for state in states)
            raise ReplicaStateError(f"replica {replica_id} is {replica.state.value}, not {wanted}")
        if self.was_told_to_end(replica):
            raise ReplicaStateError(f"replica {replica_id} is being restarted: it serves again by itself")
        return replica
