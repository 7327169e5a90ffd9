"""The artifact's dispatcher sees what replicas had taken in when they last told of a step."""

from __future__ import annotations

from peft_dist.core.messages import Progress, ReplicaStats
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator
from peft_dist.placement.artifact import ArtifactSettings, ArtifactTable
from tests.orchestrator.test_hosting import answer
from tests.orchestrator.test_lifecycle import cluster


def made(*, swaps: bool) -> Orchestrator:
    """Two replicas: "a0" is on the first, "a1" on both."""
    settings = ArtifactSettings("rotating", swaps, seats=2)
    core = cluster(table=ArtifactTable({"h-a0": 1, "h-a1": 1}, [100, 100], settings))
    for name in ("a0", "a1"):
        answer(core, core.load_adapter(name, name)[1])
    core.drain_events()
    return core


def submit(core: Orchestrator, number: int) -> int:
    new = NewRequest(f"r{number}", [5], SamplingParams(max_tokens=4), "a1")
    [replica_id] = {out.replica_id for out in core.submit(new, 0.0)}
    return replica_id


def test_what_is_on_its_way_is_not_counted() -> None:
    core = made(swaps=False)
    # Equal, as far as is known: the first one.
    assert [submit(core, number) for number in range(3)] == [0, 0, 0]
    core.observe(0, 1, Progress(sequences=[], stats=ReplicaStats(), num_taken=1), 0.0)
    assert submit(core, 3) == 0, "one of two seats is taken"
    core.observe(0, 1, Progress(sequences=[], stats=ReplicaStats(), num_taken=2), 0.0)
    assert submit(core, 4) == 1


def test_where_adapters_may_be_put_out_all_that_was_sent_counts() -> None:
    core = made(swaps=True)
    assert [submit(core, number) for number in range(4)] == [0, 0, 1, 1]


def test_the_table_says_what_is_placed() -> None:
    hosting = made(swaps=False).migration.hosting
    placed = {(name, replica) for name in ("h-a0", "h-a1") for replica in (0, 1) if hosting.is_placed(name, replica)}
    assert placed == {("h-a0", 0), ("h-a1", 0), ("h-a1", 1)}
