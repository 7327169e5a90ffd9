"""A recorded orchestrator again: another one is told the same, at the same times, and must decide the same."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from peft_dist.core.errors import ConfigError, PeftDistError
from peft_dist.core.record_file import End
from peft_dist.orchestrator import recording as rec
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.events import PlacementDue
from peft_dist.orchestrator.survey import Survey, Surveyed
from peft_dist.placement.aggregation import RequestMove
from peft_dist.placement.placer import Search
from peft_dist.sim.recordings import read_lines
from peft_dist.sim.replay import ReplayError

PREFIX = rec.PREFIX
_INPUTS = get_args(rec.Input)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What was replayed: requests that came, commands that were sent by kind, plans, placements, and why the recording
    ends before the orchestrator did."""

    requests: int
    commands: dict[str, int]
    plans: int
    placements: int
    ended: str | None

    @property
    def words(self) -> str:
        sent = sum(self.commands.values())
        return (
            f"{self.requests} requests, {sent} commands, {self.plans} plans and {self.placements} placements of an "
            "orchestrator alike"
        )


def read(path: Path) -> Iterator[rec.Entry]:
    """As ``replay.read``."""
    yield from read_lines(path, rec.Entry, lambda why: End(why))


def replay(entries: Iterable[rec.Entry]) -> Replayed:
    """Have an orchestrator decide again, on what it was told and on the plans that it was given.

    Raises:
        ReplayError: a decision differs.
        ConfigError: the recording is of another format, or ends before the first input.
    """
    again, given, ended = None, None, None
    for entry in entries:
        if isinstance(entry, End):
            ended = entry.why
            break
        if isinstance(entry, rec.Begin):
            if entry.format != rec.FORMAT:
                raise ConfigError(f"a recording of format {entry.format}: this version reads format {rec.FORMAT}")
            again = _Again(Orchestrator(entry.options))
        elif again is None:
            raise ConfigError("the recording does not begin with an orchestrator")
        elif isinstance(entry, _INPUTS):
            given = entry
        elif isinstance(entry, rec.Decided) and given is not None:
            again.check(given, entry)
            given = None
    if again is None or not again.num_inputs:
        raise ConfigError(f"the recording ends before anything was decided{': ' + ended if ended else ''}")
    return Replayed(again.requests, dict(again.commands), again.plans, again.placements, ended)


@dataclass
class _Again:
    """The other orchestrator, and what it is at."""

    core: Orchestrator
    num_inputs: int = 0
    requests: int = 0
    plans: int = 0
    placements: int = 0
    commands: Counter[str] = field(default_factory=Counter)
    search: Search | None = None
    survey: Survey | None = None
    surveyed: Surveyed | None = None
    moves: Iterator[RequestMove] = field(default_factory=lambda: iter(()))

    def check(self, given: Any, recorded: rec.Decided) -> None:
        """Raises ReplayError where something else is decided."""
        self.num_inputs += 1
        result, error = None, None
        try:
            result = self._obey(given)
        except ReplayError:
            raise
        except PeftDistError as problem:
            error = type(problem).__name__
        events = self.core.drain_events()
        for event in events:
            if isinstance(event, PlacementDue):
                self.search = event.search
        mine = rec.decided(result, events, error)
        self.commands.update(sent.kind for sent in mine.sent)
        if mine != recorded:
            raise ReplayError(f"{self._where(given)}: recorded is {_difference(recorded, mine)}")

    def _obey(self, given: Any) -> Any:
        core = self.core
        calls: dict[type[Any], Callable[[Any], Any]] = {
            rec.Submit: self._submit,
            rec.Abort: lambda g: core.abort(g.request_id, g.now, g.sequence_index),
            rec.LoadAdapter: lambda g: core.load_adapter(
                g.name, g.path, replace=g.replace, pinned=g.pinned, **g.source
            ),
            rec.UnloadAdapter: lambda g: core.unload_adapter(g.name),
            rec.DrainReplica: lambda g: core.drain_replica(g.replica_id, g.now, restart=g.restart),
            rec.ResumeReplica: lambda g: core.resume_replica(g.replica_id, g.now),
            rec.Drain: lambda g: core.drain(),
            rec.ShutDown: lambda g: core.shut_down(),
            rec.AddReplica: lambda g: core.add_replica(g.replica_id, g.now, g.start_timeout),
            rec.LoseReplica: lambda g: core.lose_replica(
                g.replica_id, g.epoch, g.reason, g.now, hangs=g.hangs, by_link=g.by_link
            ),
            rec.Observe: lambda g: core.observe(g.replica_id, g.epoch, g.report, g.now),
            rec.Tick: lambda g: core.tick(g.now),
            rec.Join: lambda g: core.replicas.join(g.start_deadline),
            rec.MoveRequest: lambda g: core.handover.move(g.request_id, g.replica_id, g.now, with_kv=g.with_kv),
            rec.ExcuseSilence: lambda g: core.lives.excuse_silence(g.now),
            rec.StopRestarts: lambda g: core.lives.stop_restarts(),
            rec.Planned: lambda g: core.migration.planned(g.origin, g.seconds, g.now),
            rec.Placed: self._placed,
            rec.Survey: self._begin_survey,
            rec.SurveyStep: lambda g: self.survey.step() if self.survey is not None else None,
            rec.Surveyed: self._survey_ended,
            rec.Plan: self._plan,
            rec.Move: self._move,
        }
        return calls[type(given)](given)

    def _submit(self, given: rec.Submit) -> Any:
        self.requests += 1
        return self.core.submit(given.new, given.now)

    def _placed(self, given: rec.Placed) -> Any:
        """The search is made again."""
        if self.search is None:
            raise ReplayError(f"{self._where(given)}: a placement was found, replayed none was looked for")
        if given.placement is not None:
            self.placements += 1
            if (mine := self.search.run()) != given.placement:
                raise ReplayError(f"{self._where(given)}: recorded is {given.placement}, replayed {mine}")
        return self.core.migration.placed(self.search, given.placement, given.now)

    def _begin_survey(self, given: rec.Survey) -> None:
        self.survey = self.core.migration.survey()

    def _survey_ended(self, given: rec.Surveyed) -> None:
        assert self.survey is not None, "it was begun"
        self.surveyed = self.survey.result(given.now)
        if rec.digest(self.surveyed.view) != given.view:
            raise ReplayError(f"{self._where(given)}: a plan would be made for other requests, replicas or adapters")

    def _plan(self, given: rec.Plan) -> Any:
        """A plan is of the planner, which time bounds; what it is made for was compared."""
        assert self.surveyed is not None, "all was looked at"
        self.plans += 1
        self.moves = iter(self.core.migration.chosen(given.plan, self.surveyed))
        return self.core.migration.prepare(given.plan)

    def _move(self, given: rec.Move) -> Any:
        assert self.surveyed is not None, "all was looked at"
        mine = list(itertools.islice(self.moves, len(given.moves)))
        if mine != given.moves:
            raise ReplayError(f"{self._where(given)}: recorded is {given.moves}, replayed {mine}")
        return self.core.migration.move(mine, self.surveyed, given.now)

    def _where(self, given: Any) -> str:
        at = f" at {given.now:.6f}" if hasattr(given, "now") else ""
        return f"input {self.num_inputs} ({type(given).__name__}{at})"


def _difference(recorded: rec.Decided, mine: rec.Decided) -> str:
    """The first command that differs, or the events and the error."""
    for one, other in zip(recorded.sent, mine.sent, strict=False):
        if one != other:
            return f"{one}, replayed {other}"
    if len(recorded.sent) != len(mine.sent):
        longer, words = (recorded, "replayed nothing") if len(recorded.sent) > len(mine.sent) else (mine, "")
        more = longer.sent[min(len(recorded.sent), len(mine.sent))]
        return f"{more}, {words}" if words else f"nothing, replayed {more}"
    return f"{recorded.events} {recorded.error or ''}, replayed {mine.events} {mine.error or ''}"
