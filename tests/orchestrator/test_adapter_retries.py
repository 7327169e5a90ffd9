"""What a replica refused is brought to it again, ever later, while that may help."""

from __future__ import annotations

import math

import pytest

from peft_dist.core.messages import AdapterResult, LoadAdapter
from peft_dist.orchestrator.adapter_retries import AGAIN
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.orchestrator.events import Notice
from tests.orchestrator.test_lifecycle import cluster, ready
from tests.orchestrator.world import mini_spec

DAMAGED = "adapter_config.json is no valid JSON"


def loads(commands: list[object]) -> list[LoadAdapter]:
    return [out.command for out in commands if isinstance(out.command, LoadAdapter)]  # type: ignore[attr-defined]


def answer(core: Orchestrator, replica_id: int, load: LoadAdapter, now: float, **result: object) -> None:
    report = AdapterResult(call_id=load.call_id, **result)  # type: ignore[arg-type]
    core.observe(replica_id, core.replicas[replica_id].epoch, report, now)


def refused(number: int = 2, **result: object) -> Orchestrator:
    """Replica 0 came back at 1.0, and refuses at 2.0 what all others hold."""
    core = cluster(number, migration="rr")
    _, commands = core.load_adapter("sql", "sql")
    for out in commands:
        answer(core, out.replica_id, out.command, 0.0, spec=mini_spec("sql", "sql"))  # type: ignore[arg-type]
    core.lose_replica(0, core.replicas[0].epoch, "it died", 0.0)
    [load] = loads(ready(core, 0, core.add_replica(0, 1.0).epoch, 1.0))
    answer(core, 0, load, 2.0, **{"error": DAMAGED, **result})
    assert core.replicas.views()[0].refused == {"h-sql": result.get("error", DAMAGED)}
    return core


def tried_at(core: Orchestrator, first: float, until: float, **result: object) -> list[float]:
    """When it is brought again by ticks at the deadlines; each time the answer is as said, at once."""
    now, found = first, []
    while (now := max(now, core._calls.next_deadline())) < until:
        [load] = loads(core.tick(now))  # type: ignore[arg-type]
        found.append(now)
        view = core.replicas.views()[0]
        assert view.can_serve and view.refused, "it still serves the rest, and not this one"
        answer(core, 0, load, now, **result)
    return found


def test_it_is_tried_ever_later_and_then_no_more() -> None:
    core = refused()
    times = tried_at(core, 2.0, math.inf, error=DAMAGED)
    waits = [after - before for before, after in zip([2.0, *times], times, strict=False)]
    assert waits == [AGAIN.wait(failures) for failures in range(1, AGAIN.max_failures)]
    assert waits[0] == AGAIN.first and max(waits) == AGAIN.longest
    last = [event.text for event in core.drain_events() if isinstance(event, Notice)][-1]
    assert "is not tried again" in last


def test_it_serves_once_its_files_are_whole() -> None:
    core = refused()
    [time] = tried_at(core, 2.0, math.inf, spec=mini_spec("sql", "sql"))
    assert time == 2.0 + AGAIN.first
    [view, _] = core.replicas.views()
    assert view.serves_all and view.serves("h-sql")


def test_what_will_never_fit_is_not_tried_again() -> None:
    core = refused(error="q has rank 4 in lora_A and 8 in lora_B", is_final=True)
    assert core._calls.next_deadline() == math.inf and loads(core.tick(1e6)) == []  # type: ignore[arg-type]


def test_other_content_is_tried_again_as_what_is_damaged() -> None:
    core = refused()
    [first, *_] = tried_at(core, 2.0, 3.0 + AGAIN.first, spec=mini_spec("sql", "other"))
    assert core.replicas.views()[0].refused and core._calls.next_deadline() == first + 2 * AGAIN.first


@pytest.mark.parametrize("way", ["unloaded", "replaced", "loaded in place", "lost"])
def test_nothing_is_tried_that_is_of_no_matter_any_more(way: str) -> None:
    core = refused()
    match way:
        case "unloaded":
            core.unload_adapter("sql")
        case "lost":
            core.lose_replica(0, core.replicas[0].epoch, "it died", 3.0)
        case _:
            path = "new" if way == "replaced" else "sql"
            for out in core.load_adapter("sql", path, replace=True)[1]:
                answer(core, out.replica_id, out.command, 3.0, spec=mini_spec("sql", path))  # type: ignore[arg-type]
    assert core._calls.next_deadline() == math.inf and loads(core.tick(60.0)) == []  # type: ignore[arg-type]


def test_a_name_taken_while_it_is_tried_ends_it() -> None:
    core = refused()
    [load] = loads(core.tick(core._calls.next_deadline()))  # type: ignore[arg-type]
    core.unload_adapter("sql")
    answer(core, 0, load, 9.0, error=DAMAGED)
    assert core._calls.next_deadline() == math.inf and not core.replicas.views()[0].refused


def test_one_that_drains_is_not_tried_until_it_serves_again() -> None:
    core = refused()
    core.drain_replica(0, 3.0)
    assert core._calls.next_deadline() == math.inf and loads(core.tick(100.0)) == []  # type: ignore[arg-type]
    core.resume_replica(0, 101.0)
    assert len(loads(core.tick(101.0))) == 1  # type: ignore[arg-type]
