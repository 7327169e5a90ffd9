"""A rolling restart: replicas are drained, ended and started again one after another, while the others serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from peft_dist.core.errors import ReplicaStateError, UnknownReplicaError
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.observation import RollingView
from peft_dist.orchestrator.records import Outgoing, Replica, ReplicaState


class RollingRestart:
    """Decides from the table of replicas alone: no clock, no task. ``look`` is called whenever something happened."""

    def __init__(self, core: Orchestrator, act: Callable[[list[Outgoing]], None], now: Callable[[], float]) -> None:
        """``act``: Sends what the core decided; it may call ``look``."""
        self._core, self._act, self._now = core, act, now
        self._view = RollingView()
        # Restarts of each replica before its process is to end, and of the current one when another came for it.
        # Not incarnations: a replica may become another one in the same process.
        self._old: dict[int, int] = {}
        self._new: int | None = None

    def view(self) -> RollingView:
        """How far the last one is."""
        return self._view

    def begin(self) -> RollingView:
        """Start with the first replica.

        Raises:
            ReplicaStateError: one is under way; or no replica can be spared, or none would be started again.
        """
        if self._view.is_running:
            raise ReplicaStateError(
                f"a rolling restart is under way, at replica {self._view.current}: wait for its end"
            )
        replicas = self._core.replicas.all()
        own = [r for r in replicas if not r.is_guest and (r.is_alive or r.will_come)]
        if not own:
            raise ReplicaStateError(
                "no replica here was started by this server: restart those that joined where they are"
            )
        if len(replicas) == 1:
            raise ReplicaStateError("there is one replica, and no other to serve meanwhile: serve with --replicas 2")
        self._core.lives.check_restarts()
        # What one refused it may take when it is started again; before others that hold it may lose it.
        own.sort(key=lambda replica: not replica.refused)
        self._old, self._new = {r.replica_id: r.num_restarts for r in own}, None
        first, *left = self._old
        skipped = tuple(r.replica_id for r in replicas if r.is_guest)
        self._view = RollingView("running", "waiting", first, left=tuple(left), skipped=skipped)
        self.look()
        if self._view.error is not None:
            raise ReplicaStateError(self._view.error)
        return self._view

    def cancel(self) -> RollingView:
        """Go no further: the replica whose turn it is comes back by itself, the rest are left as they are.

        Raises:
            ReplicaStateError: none is under way.
        """
        if not self._view.is_running:
            raise ReplicaStateError("no rolling restart is under way: there is nothing to stop")
        self._stop("somebody asked for it")
        return self._view

    def look(self) -> None:
        """Go on as far as possible."""
        while self._view.is_running and self._goes_on():
            pass

    def _goes_on(self) -> bool:
        """Take one step if it is time for it."""
        current = self._view.current
        assert current is not None
        replica = self._core.replicas.get(current)
        if replica is None:
            return self._stop(f"replica {current} is gone")
        if replica.num_restarts != self._old[current]:
            return self._starts(replica)
        if not replica.is_alive and not replica.will_come:
            return self._stop(f"replica {current} is not started again: {replica.error}")
        if self._view.stage == "waiting":
            return self._is_time(replica) and self._can_be_spared(replica) and self._drains(replica)
        if replica.state is ReplicaState.READY:
            return self._stop(f"replica {current} was resumed")
        if replica.is_alive and not replica.leaves:
            # Nothing that happens to it from now on is for this.
            return self._stop(f"replica {current} was resumed, and is drained by hand: POST /admin/resume/{current}")
        return False

    def _is_time(self, replica: Replica) -> bool:
        """Whether a replica serves, and so does every other one that is going to."""
        others = [other for other in self._core.replicas.all() if other is not replica]
        if any(other.will_be_ready or other.coming for other in others):
            return False
        return replica.state is ReplicaState.READY or self._core.lives.was_drained(replica)

    def _can_be_spared(self, replica: Replica) -> bool:
        """Whether others hold every adapter that a replica does."""
        others = [other for other in self._core.replicas.ready() if other is not replica]
        for content in {each for other in others for each in other.refused} - replica.refused.keys():
            if all(content in other.refused for other in others):
                other, name = others[0], self._core.adapters.name_of(content)
                where = f"adapter {name!r}, which replica {other.replica_id} refused: {other.refused[content]}"
                return self._stop(f"replica {replica.replica_id} alone holds {where}")
        return True

    def _drains(self, replica: Replica) -> bool:
        # Before anything is sent: whoever sends looks again.
        self._view = replace(self._view, stage="draining")
        try:
            out = self._core.drain_replica(replica.replica_id, self._now(), restart=True)
        except (ReplicaStateError, UnknownReplicaError) as error:
            return self._stop(str(error))
        self._act(out)
        return True

    def _starts(self, replica: Replica) -> bool:
        """Another incarnation is there; once it serves, or waits to be resumed, the next one's turn has come."""
        view = self._view
        self._new = replica.num_restarts if self._new is None else self._new
        if replica.num_restarts != self._new or not replica.is_alive:
            return self._stop(f"replica {replica.replica_id} did not come back: {replica.error}")
        for content, why in replica.refused.items():
            name = self._core.adapters.name_of(content)
            return self._stop(f"replica {replica.replica_id} came back and refused adapter {name!r}: {why}")
        if replica.state is ReplicaState.STARTING or replica.coming:
            self._view = replace(view, stage="starting")
            return False
        done, self._new = (*view.restarted, replica.replica_id), None
        if view.left:
            self._view = replace(view, stage="waiting", current=view.left[0], restarted=done, left=view.left[1:])
        else:
            self._view = replace(view, state="done", stage=None, current=None, restarted=done)
        return True

    def _stop(self, reason: str) -> bool:
        """Leave everything as it is: what was drained starts by itself, the others go on."""
        self._view = replace(self._view, state="stopped", stage=None, error=reason)
        return False
