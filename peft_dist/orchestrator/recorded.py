"""An orchestrator whose inputs are noted before they are obeyed, with what it decides."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

from peft_dist.core.errors import PeftDistError
from peft_dist.core.messages import AnyReport
from peft_dist.core.record_file import FULL, End, Recorder, RecordFile, recording_folder
from peft_dist.orchestrator import recording
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.records import Outgoing, Replica
from peft_dist.orchestrator.survey import Survey, Surveyed
from peft_dist.placement.aggregation import RequestMove
from peft_dist.placement.placer import Search
from peft_dist.placement.placing import Placement
from peft_dist.placement.types import MigrationPlan

logger = logging.getLogger(__name__)
Noting = Callable[[recording.Input, Callable[[], Any]], Any]


def make_orchestrator(options: OrchestratorOptions, *, finds_replicas: bool = False) -> Orchestrator:
    """One that is recorded where the environment asks for that.

    ``finds_replicas``: Some of an earlier one are there, of which a recording would not tell all: there is none then.
    """
    folder = recording_folder()
    if folder is not None and finds_replicas:
        logger.warning("the orchestrator is not recorded: it goes on with replicas of an earlier one")
    if folder is None or finds_replicas:
        return Orchestrator(options)
    return RecordedOrchestrator(options, RecordFile(folder, recording.PREFIX, End(FULL)))


class RecordedOrchestrator(Orchestrator):
    """Calls that one of these calls makes are not noted."""

    def __init__(self, options: OrchestratorOptions, write: Callable[[recording.Entry], None]) -> None:
        if options.seed is None:
            options = replace(options, seed=secrets.randbits(63))
        super().__init__(options)
        self._recorder = Recorder(write)
        self._depth_of_calls = 0
        self._recorder.note(recording.Begin(recording.FORMAT, options))
        # Whoever drives it calls these directly.
        self.migration = cast(Any, _Migration(self.migration, self._noted))
        self.handover = cast(Any, _Handover(self.handover, self._noted))
        self.lives = cast(Any, _Lives(self.lives, self._noted))
        self.replicas = cast(Any, _Replicas(self.replicas, self._noted, self._recorder.end))

    def submit(self, new: NewRequest, now: float) -> list[Outgoing]:
        submit = super().submit
        return self._list(recording.Submit(new, now), lambda: submit(new, now))

    def abort(self, request_id: str, now: float, sequence_index: int | None = None) -> list[Outgoing]:
        abort = super().abort
        entry = recording.Abort(request_id, now, sequence_index)
        return self._list(entry, lambda: abort(request_id, now, sequence_index))

    def load_adapter(
        self, name: str, path: str, *, replace: bool = False, pinned: bool | None = None, **source: Any
    ) -> tuple[int, list[Outgoing]]:
        load = super().load_adapter
        entry = recording.LoadAdapter(name, path, replace, pinned, source)
        called = self._noted(entry, lambda: load(name, path, replace=replace, pinned=pinned, **source))
        return cast(tuple[int, list[Outgoing]], called)

    def unload_adapter(self, name: str) -> list[Outgoing]:
        unload = super().unload_adapter
        return self._list(recording.UnloadAdapter(name), lambda: unload(name))

    def drain_replica(self, replica_id: int, now: float, *, restart: bool = False) -> list[Outgoing]:
        drain = super().drain_replica
        entry = recording.DrainReplica(replica_id, now, restart)
        return self._list(entry, lambda: drain(replica_id, now, restart=restart))

    def resume_replica(self, replica_id: int, now: float) -> list[Outgoing]:
        resume = super().resume_replica
        return self._list(recording.ResumeReplica(replica_id, now), lambda: resume(replica_id, now))

    def drain(self) -> None:
        self._noted(recording.Drain(), super().drain)

    def shut_down(self) -> list[Outgoing]:
        return self._list(recording.ShutDown(), super().shut_down)

    def add_replica(self, replica_id: int, now: float, start_timeout: float | None = None) -> Replica:
        add = super().add_replica
        entry = recording.AddReplica(replica_id, now, start_timeout)
        return cast(Replica, self._noted(entry, lambda: add(replica_id, now, start_timeout)))

    def lose_replica(
        self, replica_id: int, epoch: int, reason: str, now: float, *, hangs: bool = False, by_link: bool = False
    ) -> list[Outgoing]:
        lose = super().lose_replica
        entry = recording.LoseReplica(replica_id, epoch, reason, now, hangs, by_link)
        return self._list(entry, lambda: lose(replica_id, epoch, reason, now, hangs=hangs, by_link=by_link))

    def observe(self, replica_id: int, epoch: int, report: AnyReport, now: float) -> list[Outgoing]:
        observe = super().observe
        entry = recording.Observe(replica_id, epoch, report, now)
        return self._list(entry, lambda: observe(replica_id, epoch, report, now))

    def tick(self, now: float) -> list[Outgoing]:
        tick = super().tick
        return self._list(recording.Tick(now), lambda: tick(now))

    def _list(self, entry: recording.Input, call: Callable[[], list[Outgoing]]) -> list[Outgoing]:
        return cast(list[Outgoing], self._noted(entry, call))

    def _noted(self, entry: recording.Input, call: Callable[[], Any]) -> Any:
        if self._depth_of_calls:
            return call()
        self._recorder.note(entry)
        first, result, error = len(self._events), None, None
        self._depth_of_calls += 1
        try:
            result = call()
            return result
        except PeftDistError as problem:
            error = type(problem).__name__
            raise
        finally:
            self._depth_of_calls -= 1
            self._recorder.note(recording.decided(result, self._events[first:], error))


class _Part:
    """A part of the orchestrator, of which only what is called from outside and changes something is noted."""

    def __init__(self, part: Any, noted: Noting) -> None:
        self._part, self._noted = part, noted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


class _Migration(_Part):
    def survey(self) -> _Survey:
        return _Survey(self._noted(recording.Survey(), self._part.survey), self._noted)

    def prepare(self, plan: MigrationPlan) -> Any:
        return self._noted(recording.Plan(plan), lambda: self._part.prepare(plan))

    def move(self, moves: Sequence[RequestMove], surveyed: Surveyed, now: float) -> Any:
        return self._noted(recording.Move(list(moves), now), lambda: self._part.move(moves, surveyed, now))

    def planned(self, origin: str, seconds: float, now: float) -> None:
        self._noted(recording.Planned(origin, seconds, now), lambda: self._part.planned(origin, seconds, now))

    def placed(self, search: Search, placement: Placement | None, now: float) -> Any:
        return self._noted(recording.Placed(placement, now), lambda: self._part.placed(search, placement, now))


class _Survey:
    def __init__(self, survey: Survey, noted: Noting) -> None:
        self._survey, self._noted = survey, noted

    def step(self) -> bool:
        return cast(bool, self._noted(recording.SurveyStep(), self._survey.step))

    def result(self, now: float) -> Surveyed:
        found = self._survey.result(now)
        self._noted(recording.Surveyed(now, recording.digest(found.view)), lambda: None)
        return found


class _Handover(_Part):
    def move(self, request_id: str, replica_id: int, now: float, *, with_kv: bool | None = None) -> Any:
        entry = recording.MoveRequest(request_id, replica_id, now, with_kv)
        return self._noted(entry, lambda: self._part.move(request_id, replica_id, now, with_kv=with_kv))


class _Lives(_Part):
    def excuse_silence(self, now: float) -> None:
        self._noted(recording.ExcuseSilence(now), lambda: self._part.excuse_silence(now))

    def stop_restarts(self) -> None:
        self._noted(recording.StopRestarts(), self._part.stop_restarts)


class _Replicas(_Part):
    def __init__(self, part: Any, noted: Noting, end: Callable[[str], None]) -> None:
        super().__init__(part, noted)
        self._end = end

    def __getitem__(self, replica_id: int) -> Replica:
        return cast(Replica, self._part[replica_id])

    def __len__(self) -> int:
        return len(self._part)

    def join(self, start_deadline: float, wanted: int | None = None) -> Replica:
        if wanted is not None:
            self._end("a replica of an earlier orchestrator was adopted")
        join = self._part.join
        return cast(Replica, self._noted(recording.Join(start_deadline), lambda: join(start_deadline, wanted)))
