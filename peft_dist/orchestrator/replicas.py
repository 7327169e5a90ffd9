"""The table of replicas: who is starting, ready or dead, and in which incarnation."""

from __future__ import annotations

from collections.abc import Callable

from peft_dist.core.errors import EngineDeadError
from peft_dist.core.messages import Progress, Ready, ReplicaStats
from peft_dist.orchestrator.observation import ReplicaTotals, ReplicaView
from peft_dist.orchestrator.records import Replica, ReplicaState


class ReplicaTable:
    """Replicas by id. Epochs count over all replicas, so no two incarnations share one."""

    def __init__(self) -> None:
        self._by_id: dict[int, Replica] = {}
        self._next_epoch = 1

    def __getitem__(self, replica_id: int) -> Replica:
        return self._by_id[replica_id]

    def add(self, replica_id: int, start_deadline: float | None) -> Replica:
        """Enter a new incarnation in place of any earlier one."""
        replica = Replica(replica_id, self._next_epoch, start_deadline=start_deadline)
        lost = self._by_id.get(replica_id)
        if lost is not None:
            replica.earlier, replica.model = _totals(lost), lost.model
        self._next_epoch += 1
        self._by_id[replica_id] = replica
        return replica

    def get(self, replica_id: int) -> Replica | None:
        """The replica with this id, dead or alive; None when there is none."""
        return self._by_id.get(replica_id)

    def alive(self, replica_id: int, epoch: int) -> Replica | None:
        """The replica if this very incarnation of it is starting or ready."""
        replica = self._by_id.get(replica_id)
        if replica is None or replica.epoch != epoch or replica.state is ReplicaState.DEAD:
            return None
        return replica

    def all_alive(self) -> list[Replica]:
        """Replicas that start or serve."""
        return [replica for replica in self._by_id.values() if replica.state is not ReplicaState.DEAD]

    def ready(self) -> list[Replica]:
        """Replicas that serve."""
        return [replica for replica in self._by_id.values() if replica.state is ReplicaState.READY]

    def choose(self, load: Callable[[Replica], int]) -> Replica:
        """The ready replica with the least load. Raises EngineDeadError when none is ready."""
        ready = self.ready()
        if not ready:
            raise EngineDeadError(self.health_error())
        return min(ready, key=load)

    def mark_ready(self, replica: Replica, report: Ready) -> None:
        """Note that a replica has loaded its model."""
        replica.state, replica.start_deadline = ReplicaState.READY, None
        replica.model, replica.pid = report.model, report.pid

    def take_in(self, replica: Replica, report: Progress) -> None:
        """Remember what a replica says of itself; details come less often than its stats."""
        replica.stats, replica.detail = report.stats, report.detail or replica.detail

    def mark_dead(self, replica: Replica, error: EngineDeadError) -> None:
        """Note that a replica is gone, and why."""
        replica.state, replica.start_deadline = ReplicaState.DEAD, None
        replica.error = error

    def late(self, now: float) -> list[Replica]:
        """Replicas that should have been ready by now."""
        return [r for r in self._by_id.values() if r.start_deadline is not None and r.start_deadline <= now]

    def health_error(self) -> str:
        """Why no replica is ready, in the words of the last one that died."""
        errors = [str(replica.error) for replica in self._by_id.values() if replica.error is not None]
        return errors[-1] if errors else "No replica is ready yet."

    def stats(self) -> ReplicaStats:
        """The last report of a ready replica, or of the last known one when none is ready."""
        replicas = self.ready() or list(self._by_id.values())[-1:]
        return replicas[0].stats if replicas else ReplicaStats()

    def views(self) -> list[ReplicaView]:
        """Every replica as it was last heard of, the dead ones too."""
        return [
            ReplicaView(r.replica_id, r.state.value, r.model, r.stats, r.detail, _totals(r))
            for r in self._by_id.values()
        ]


def _totals(replica: Replica) -> ReplicaTotals:
    return replica.earlier + ReplicaTotals.of(replica.stats, replica.detail)
