"""The table of replicas: who is starting, ready, draining, drained or dead, and in which incarnation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from peft_dist.core.config import ModelInfo
from peft_dist.core.errors import ConfigError, EngineDeadError
from peft_dist.core.messages import Progress, Ready, ReplicaStats
from peft_dist.core.step_costs import StepCosts
from peft_dist.orchestrator.admission import token_limit
from peft_dist.orchestrator.observation import ReplicaTotals, ReplicaView
from peft_dist.orchestrator.records import Replica, ReplicaState

# By then a cost model goes by what it has measured, and not by what it was begun with.
_MEASURED_STEPS = 32
# Seconds after which costs that no such number of steps has borne out count for less than those of others.
_OUTDATED_SECONDS = 10.0


class ReplicaTable:
    """Replicas by id. Epochs count over all replicas, so no two incarnations share one."""

    def __init__(self, first_epoch: int = 1) -> None:
        self._by_id: dict[int, Replica] = {}
        self._next_epoch = first_epoch
        # What is asked for every request and report, until a replica changes its state.
        self._in_state: dict[ReplicaState, list[Replica]] = {}
        self._ready: list[Replica] | None = None
        self._draining: list[Replica] | None = None
        self._alive: list[Replica] | None = None
        self._model: ModelInfo | None = None

    def __getitem__(self, replica_id: int) -> Replica:
        return self._by_id[replica_id]

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, replica_id: int, start_deadline: float | None) -> Replica:
        """Enter a new incarnation in place of an earlier one, which must be dead (or ConfigError is raised)."""
        replica = Replica(replica_id, self._next_epoch, start_deadline=start_deadline)
        lost = self._by_id.get(replica_id)
        if lost is not None and lost.is_alive:
            raise ConfigError(f"replica {replica_id} is still {lost.state.value}: it cannot be started again")
        if lost is not None:
            replica.earlier, replica.model, replica.error = _totals(lost), lost.model, lost.error
            replica.capacity_tokens, replica.stays_drained = lost.capacity_tokens, lost.stays_drained
            replica.num_restarts, replica.num_failures = lost.num_restarts + 1, lost.num_failures
        self._next_epoch += 1
        self._by_id[replica_id] = replica
        self._changed()
        return replica

    def join(self, start_deadline: float, wanted: int | None = None) -> Replica:
        """Enter an incarnation that somebody else starts, under the id ``wanted`` or the least that no other has."""
        free = next(number for number in itertools.count() if number not in self._by_id)
        replica = self.add(free if wanted is None or wanted in self._by_id else wanted, start_deadline)
        replica.is_guest = True
        return replica

    def renew(self, lost: Replica, *, start_deadline: float) -> Replica:
        """Enter an incarnation that is to go on in the process of a dead one."""
        replica = self.add(lost.replica_id, start_deadline)
        replica.is_survivor = replica.is_renewed = True
        replica.is_guest = lost.is_guest
        # What it counts goes on.
        replica.earlier, replica.detail = lost.earlier, lost.detail
        replica.tell(lost.stats)
        replica.num_restarts, replica.num_failures = lost.num_restarts, lost.num_failures
        return replica

    def remove(self, replica: Replica) -> None:
        """Forget a dead replica that will not come back under its id."""
        del self._by_id[replica.replica_id]
        self._changed()

    def get(self, replica_id: int) -> Replica | None:
        """The replica with this id, dead or alive; None when there is none."""
        return self._by_id.get(replica_id)

    def alive(self, replica_id: int, epoch: int) -> Replica | None:
        """The replica if this very incarnation of it lives."""
        replica = self._by_id.get(replica_id)
        return replica if replica is not None and replica.epoch == epoch and replica.is_alive else None

    def all(self) -> list[Replica]:
        """Every replica, the dead ones too."""
        return list(self._by_id.values())

    def all_alive(self) -> list[Replica]:
        """Replicas that live: they start, serve, or are drained. Not to be changed."""
        if self._alive is None:
            self._alive = [replica for replica in self._by_id.values() if replica.state is not ReplicaState.DEAD]
        return self._alive

    def ready(self) -> list[Replica]:
        """Replicas that take requests; not to be changed."""
        # Not looked up by its state: a key that is an enum's is hashed by Python code.
        if self._ready is None:
            self._ready = self.in_state(ReplicaState.READY)
        return self._ready

    def draining(self) -> list[Replica]:
        """Replicas that are to be empty; not to be changed."""
        if self._draining is None:
            self._draining = self.in_state(ReplicaState.DRAINING)
        return self._draining

    def in_state(self, state: ReplicaState) -> list[Replica]:
        """Not to be changed."""
        found = self._in_state.get(state)
        if found is None:
            found = self._in_state[state] = [replica for replica in self._by_id.values() if replica.state is state]
        return found

    def enter(self, replica: Replica, state: ReplicaState) -> None:
        """Note where in its life a replica is."""
        replica.state = state
        self._changed()

    def _changed(self) -> None:
        # What was given out stays as it was.
        self._in_state, self._alive, self._model = {}, None, None
        self._ready = self._draining = None

    def misfit(self, replica: Replica, model: ModelInfo) -> str | None:
        """Why a replica with this model cannot go on with what others began, nor they with its requests; None: it can.

        They are compared as long as any incarnation is known: streams of the ones before it may still run.
        """
        for other in self._by_id.values():
            if other.model is None:
                continue
            for what in ("fingerprint", "vocab_size", "eos_token_ids"):
                here, there = getattr(model, what), getattr(other.model, what)
                if here != there and "" not in (here, there):
                    name = "weights or configuration" if what == "fingerprint" else what
                    return (
                        f"Replica {replica.replica_id} has another model ({model.model}) than replica "
                        f"{other.replica_id} ({other.model.model}): other {name}, {here} and {there}. Give it the same "
                        "files, config.json too (with a hub id the same --revision), or start the server anew with "
                        "the new ones."
                    )
        return None

    def mark_ready(self, replica: Replica, report: Ready, now: float) -> None:
        """Note that a replica has loaded its model."""
        self.enter(replica, ReplicaState.READY)
        # What ended the one before it says nothing of this one.
        replica.start_deadline = replica.error = None
        replica.model, replica.pid, replica.costs = report.model, report.pid, report.costs
        replica.capacity_tokens = report.model.num_blocks * report.model.block_size
        replica.ready_since = replica.last_heard = now
        replica.was_adopted, replica.is_survivor = replica.is_survivor, False
        self._lend_costs(now)

    def take_in(self, replica: Replica, report: Progress, now: float) -> None:
        """Remember what a replica says of itself; details come less often than its stats."""
        replica.tell(report.stats)
        replica.has_taken(report.num_taken)
        if report.detail is not None:
            replica.detail = report.detail
            if report.detail.num_steps >= replica.measured_steps + _MEASURED_STEPS:
                replica.measured_steps, replica.measured_at = report.detail.num_steps, now
            if report.detail.costs is not None and report.detail.costs != replica.costs:
                # Equal ones are one object, for whoever compares all of them for each request.
                equal = next((r.costs for r in self._by_id.values() if r.costs == report.detail.costs), None)
                replica.costs = equal or report.detail.costs
            self._lend_costs(now)
            replica.on_host = frozenset(one.content_hash for one in report.detail.adapters if one.tier == "host")

    def _lend_costs(self, now: float) -> None:
        """Who has run few steps is taken to be like who has run most: what it says is a guess from its start, when
        others may have had the machine. With one that is too high it would get no requests, and never learn better.
        While nobody has run many, all are taken to be like who guessed least.

        In the same way who has run few of late is taken to cost no more than the least that one of its kind does.
        """
        ready = [replica for replica in self.ready() if replica.costs is not None]
        if len({id(replica.costs) for replica in ready}) < 2:
            return  # Whatever is lent to whom, it is the same.
        measured = [replica for replica in ready if replica.detail.num_steps >= _MEASURED_STEPS]
        if measured:
            costs = max(measured, key=lambda one: one.detail.num_steps).costs
        else:
            costs = min((replica.costs for replica in ready if replica.costs), key=_some_work, default=None)
        for replica in ready:
            if replica.detail.num_steps < _MEASURED_STEPS:
                replica.costs = costs
        outdated = [replica for replica in measured if replica.measured_at + _OUTDATED_SECONDS < now]
        if not outdated:
            return
        least: dict[object, StepCosts] = {}
        for one in measured:
            known = least.get(kind := _kind(one))
            # Equal ones are one object.
            if one.costs is not None and one.costs is not known:
                least[kind] = one.costs if known is None else min(known, one.costs, key=_some_work)
        for replica in outdated:
            replica.costs = least[_kind(replica)]

    def mark_dead(self, replica: Replica, error: EngineDeadError) -> None:
        """Note that a replica is gone, and why."""
        self.enter(replica, ReplicaState.DEAD)
        replica.start_deadline = None
        replica.leaves, replica.restart_at = False, None
        replica.error = error

    def late(self, now: float) -> list[Replica]:
        """Replicas that should have been ready by now."""
        return [r for r in self._by_id.values() if r.start_deadline is not None and r.start_deadline <= now]

    def model(self) -> ModelInfo:
        """The model as the replica with the least room serves it: a request must fit wherever it goes.

        Raises:
            EngineDeadError: no replica was ever ready.
        """
        if self._model is not None:
            return self._model
        known = [replica.model for replica in self._by_id.values() if replica.model is not None]
        if not known:
            raise EngineDeadError(self.health_error())
        self._model = known[0] if known.count(known[0]) == len(known) else min(known, key=token_limit)
        return self._model

    def health_error(self) -> str:
        """Why no replica is ready, in the words of the last one that died."""
        if self.in_state(ReplicaState.DRAINING) or self.in_state(ReplicaState.DRAINED):
            return "All replicas that serve are drained, or are being drained: resume one, or wait for another."
        errors = [str(replica.error) for replica in self._by_id.values() if replica.error is not None]
        return errors[-1] if errors else "No replica is ready yet."

    def stats(self) -> ReplicaStats:
        """The last report of a ready replica, or of the last known one when none is ready."""
        replicas: Iterable[Replica] = self.ready() or list(self._by_id.values())[-1:]
        return next((replica.stats for replica in replicas), ReplicaStats())

    def views(self) -> list[ReplicaView]:
        """Every replica as it was last heard of, the dead ones too."""
        return [_view(replica) for replica in self._by_id.values()]


def _kind(replica: Replica) -> tuple[str, str] | None:
    """What replicas of which the same may be expected have in common."""
    return None if replica.model is None else (replica.model.device, replica.model.dtype)


def _some_work(costs: StepCosts) -> float:
    """Seconds of a prompt and of steps of a few sequences, to compare guesses by."""
    return costs.prefill_seconds(256) + 64 * costs.decode_seconds(8, {})


def _view(replica: Replica) -> ReplicaView:
    return ReplicaView(
        replica_id=replica.replica_id,
        state="unreached" if replica.is_unreached else replica.state.value,
        model=replica.model,
        stats=replica.stats,
        detail=replica.detail,
        totals=_totals(replica),
        is_warm=replica.is_warm,
        num_restarts=replica.num_restarts,
        coming=frozenset(replica.coming),
        refused=dict(replica.refused),
        error=None if replica.error is None else str(replica.error),
    )


def _totals(replica: Replica) -> ReplicaTotals:
    return replica.earlier + ReplicaTotals.of(replica.stats, replica.detail)
