"""The Orchestrator's rules, one at a time."""

from __future__ import annotations

import pytest

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.config import ModelInfo
from peft_dist.core.errors import (
    AdapterError,
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    PeftDistError,
    QueueFullError,
    UnknownModelError,
)
from peft_dist.core.messages import (
    AbortRequest,
    AdapterResult,
    Fatal,
    Progress,
    Ready,
    ReplicaStats,
    SequenceProgress,
    Shutdown,
    UnloadAdapter,
    Warmth,
)
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.core.succession import NameAdapters
from peft_dist.orchestrator.client import NewRequest
from peft_dist.orchestrator.core import Orchestrator, OrchestratorOptions
from peft_dist.orchestrator.events import Notice, ReplicaLost, RequestFailed, SequenceEvent
from peft_dist.orchestrator.records import Outgoing
from tests.worker.fake_replica import VOCAB_SIZE, fake_model


def ready_core(max_num_seqs: int = 8, max_queue: int = 8, seed: int = 0) -> Orchestrator:
    core = Orchestrator(OrchestratorOptions(max_num_seqs, max_queue, seed))
    core.add_replica(0, 0.0)
    core.observe(0, 1, Ready(model=fake_model("org/base"), pid=7), 0.0)
    core.drain_events()
    return core


def load(core: Orchestrator, name: str, content: str, replace: bool = False) -> list[Outgoing]:
    call_id, _ = core.load_adapter(name, name, replace=replace)
    spec = AdapterSpec(name=name, content_hash=content, path=name, ranks={"q": 4}, num_bytes=1)
    return unnamed(core.observe(0, 1, AdapterResult(call_id=call_id, spec=spec), 0.0))


def unnamed(commands: list[Outgoing]) -> list[Outgoing]:
    """Without those that only have replicas remember names."""
    return [out for out in commands if not isinstance(out.command, NameAdapters)]


def submit(core: Orchestrator, request_id: str = "r", model: str | None = None, **params: object) -> list[Outgoing]:
    return core.submit(NewRequest(request_id, [5, 6], SamplingParams(**params), model), 0.0)


def progress(*sequences: SequenceProgress) -> Progress:
    return Progress(sequences=list(sequences), stats=ReplicaStats())


def tokens(sequence_id: str, ids: list[int], first: int, reason: str | None = None) -> Progress:
    return progress(SequenceProgress(request_id=sequence_id, token_ids=ids, first_index=first, finish_reason=reason))


@pytest.mark.parametrize("name", [None, "__base__", "org/base", "base"])
def test_names_of_the_base(name: str | None) -> None:
    core = ready_core()
    load(core, "sql", "h1")
    assert core.adapters.resolve(name) is None


@pytest.mark.parametrize("name", ["sql", "base:sql", "org/base:sql", "__base__:sql"])
def test_names_of_an_adapter(name: str) -> None:
    core = ready_core()
    load(core, "sql", "h1")
    spec = core.adapters.resolve(name)
    assert spec is not None and spec.content_hash == "h1"


@pytest.mark.parametrize("name", ["", "SQL", "sql ", "base:", "base:base", "base:none", "other:sql", "sql:base", "bas"])
def test_other_names_are_unknown_and_never_the_base(name: str) -> None:
    core = ready_core()
    load(core, "sql", "h1")
    with pytest.raises(UnknownModelError, match="'sql'"):
        submit(core, model=name)


@pytest.mark.parametrize("name", ["", " sql", "base", "org/base", "__base__", "base:sql"])
def test_names_that_no_adapter_can_have(name: str) -> None:
    with pytest.raises(AdapterError):
        ready_core().load_adapter(name, "path")


def test_a_seed_of_the_user_is_kept_and_others_are_drawn_reproducibly() -> None:
    def seeds(seed: int) -> list[int]:
        core = ready_core(seed=seed)
        return [submit(core, f"r{i}")[0].command.seed for i in range(3)]  # type: ignore[union-attr]

    assert seeds(1) == seeds(1) != seeds(2)
    assert len(set(seeds(1))) == 3
    assert submit(ready_core(), seed=-5)[0].command.seed == -5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        ([VOCAB_SIZE], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([True], {}, "prompt"),
        (["a"], {}, "prompt"),
        ([1.0], {}, "prompt"),
        ([1] * 500, {"max_tokens": None}, "prompt"),
        ([1] * 500, {"max_tokens": 1}, "prompt"),
        ([1] * 501, {"max_tokens": 0}, "prompt"),
        ([1] * 490, {"max_tokens": 11}, "max_tokens"),
        ([1] * 490, {"max_tokens": None, "min_tokens": 11}, "min_tokens"),
        ([1], {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ([1], {"stop_token_ids": (VOCAB_SIZE,)}, "stop_token_ids"),
        ([1], {"n": 17}, "n"),
    ],
)
def test_what_can_never_be_served_names_the_parameter(prompt: list[int], params: dict, param: str) -> None:  # type: ignore[type-arg]
    core = ready_core()
    with pytest.raises(InvalidRequestError) as caught:
        core.submit(NewRequest("r", prompt, SamplingParams(**params)), 0.0)
    assert caught.value.param == param
    assert core.num_unfinished == 0


@pytest.mark.parametrize(("length", "max_tokens"), [(500, 0), (490, 10), (499, 1), (499, None)])
def test_the_whole_length_can_be_used(length: int, max_tokens: int | None) -> None:
    core = ready_core()
    [out] = core.submit(NewRequest("r", [1] * length, SamplingParams(max_tokens=max_tokens)), 0.0)
    assert out.command.params.max_tokens == (500 - length if max_tokens is None else max_tokens)  # type: ignore[union-attr]


def test_the_blocks_bound_the_length_too() -> None:
    model = fake_model("org/base", max_model_len=100_000)
    core = Orchestrator(OrchestratorOptions())
    core.add_replica(0, 0.0)
    core.observe(0, 1, Ready(model=model, pid=7), 0.0)
    with pytest.raises(InvalidRequestError, match=str(model.num_blocks * model.block_size)):
        core.submit(NewRequest("r", [1] * 2000, SamplingParams()), 0.0)


def test_a_request_id_is_used_once_at_a_time() -> None:
    core = ready_core()
    submit(core)
    with pytest.raises(InvalidRequestError, match="in use"):
        submit(core)
    core.observe(0, 1, tokens("r-0", [1], 0, "stop"), 1.0)
    assert len(submit(core)) == 1


def test_the_queue_refuses_beyond_its_bound_and_tells_when_to_come_back() -> None:
    core = ready_core(max_num_seqs=2, max_queue=1)
    for i in range(3):
        submit(core, f"r{i}")
    with pytest.raises(QueueFullError) as caught:
        submit(core, "late")
    assert caught.value.retry_after == 1.0
    for i, at in ((0, 10.0), (1, 18.0)):
        core.observe(0, 1, tokens(f"r{i}-0", [1], 0, "stop"), at)
        submit(core, f"more{i}")
    with pytest.raises(QueueFullError) as caught:
        submit(core, "late")
    assert caught.value.retry_after == 8.0


def test_what_a_replica_has_not_taken_in_keeps_its_room_though_its_client_has_gone() -> None:
    core = ready_core(max_num_seqs=2, max_queue=1)
    for number in range(3):
        submit(core, f"r{number}")
        core.abort(f"r{number}", 0.0)
    assert core.num_unfinished == 0 and core.room.num_held == 3
    with pytest.raises(QueueFullError):
        submit(core, "next")
    core.observe(0, 1, Progress(sequences=[], stats=ReplicaStats(), num_taken=2), 0.0)
    submit(core, "next", n=2)
    with pytest.raises(QueueFullError):
        submit(core, "another")
    # What it has taken in is gone when it is told to end it.
    core.observe(0, 1, Progress(sequences=[], stats=ReplicaStats(), num_taken=5), 0.0)
    core.abort("next", 0.0)
    assert core.room.num_held == 0


def test_progress_reaches_its_sequence_and_ends_it() -> None:
    core = ready_core()
    submit(core, n=2)
    core.observe(0, 1, progress(*tokens("r-1", [4], 0).sequences, *tokens("r-0", [9], 0, "stop").sequences), 1.0)
    events = core.drain_events()
    assert [(e.sequence_index, e.progress.token_ids) for e in events if isinstance(e, SequenceEvent)] == [
        (1, [4]),
        (0, [9]),
    ]
    assert core.num_unfinished == 1
    core.observe(0, 1, tokens("r-0", [8], 1), 1.0)
    assert core.drain_events() == []


def test_repeated_tokens_are_cut_and_lost_tokens_end_the_sequence() -> None:
    core = ready_core()
    submit(core)
    core.observe(0, 1, tokens("r-0", [1, 2], 0), 1.0)
    core.observe(0, 1, tokens("r-0", [2, 3], 1), 1.0)
    seen = [e.progress.token_ids for e in core.drain_events() if isinstance(e, SequenceEvent)]
    assert seen == [[1, 2], [3]]
    [out] = core.observe(0, 1, tokens("r-0", [5], 4), 1.0)
    assert out.command == AbortRequest(request_ids=["r-0"])
    [event] = core.drain_events()
    assert isinstance(event, SequenceEvent) and event.progress.finish_reason == "error"
    assert "3 to 3" in str(event.progress.error)


def test_abort_ends_one_sequence_or_all() -> None:
    core = ready_core()
    submit(core, n=3)
    [out] = core.abort("r", 1.0, sequence_index=1)
    assert out.command == AbortRequest(request_ids=["r-1"])
    assert len(core.abort("r", 1.0)) == 2
    assert core.abort("r", 1.0) == []
    events = [e for e in core.drain_events() if isinstance(e, SequenceEvent)]
    assert [(e.sequence_index, e.progress.finish_reason) for e in events] == [(1, "abort"), (0, "abort"), (2, "abort")]


def test_unloading_waits_for_running_requests_but_not_for_new_ones() -> None:
    core = ready_core()
    load(core, "sql", "h1")
    submit(core, model="sql")
    assert unnamed(core.unload_adapter("sql")) == []
    with pytest.raises(UnknownModelError):
        submit(core, "new", model="sql")
    [out] = core.observe(0, 1, tokens("r-0", [1], 0, "stop"), 1.0)
    assert isinstance(out.command, UnloadAdapter) and out.command.content_hash == "h1"


def test_nothing_is_dropped_while_a_load_may_bring_it_again() -> None:
    core = ready_core()
    load(core, "a", "h1")
    call_id, _ = core.load_adapter("b", "b")
    assert unnamed(core.unload_adapter("a")) == []
    spec = AdapterSpec(name="b", content_hash="h1", path="b", ranks={"q": 4}, num_bytes=1)
    assert unnamed(core.observe(0, 1, AdapterResult(call_id=call_id, spec=spec), 0.0)) == []
    assert core.adapters.specs() == [spec]


def test_content_is_dropped_once() -> None:
    core = ready_core()
    load(core, "a", "h1")
    [drop] = unnamed(core.unload_adapter("a"))
    assert core.observe(0, 1, AdapterResult(call_id=drop.command.call_id), 1.0) == []  # type: ignore[union-attr]


def test_content_under_two_names_lives_until_the_last_is_gone() -> None:
    core = ready_core()
    load(core, "a", "h1")
    load(core, "b", "h1")
    assert unnamed(core.unload_adapter("a")) == []
    [out] = unnamed(core.unload_adapter("b"))
    assert isinstance(out.command, UnloadAdapter)


def test_replacing_keeps_the_old_content_for_those_that_run() -> None:
    core = ready_core()
    load(core, "sql", "h1")
    submit(core, "old", model="sql")
    with pytest.raises(AdapterError, match="loaded already"):
        core.load_adapter("sql", "sql")
    assert load(core, "sql", "h2", replace=True) == []
    [new] = submit(core, "new", model="sql")
    assert new.command.content_hash == "h2"  # type: ignore[union-attr]
    [drop] = core.abort("old", 1.0)[1:]
    assert isinstance(drop.command, UnloadAdapter) and drop.command.content_hash == "h1"
    assert [spec.content_hash for spec in core.adapters.specs()] == ["h2"]


def test_a_refused_load_leaves_the_name_free() -> None:
    core = ready_core()
    call_id, _ = core.load_adapter("sql", "sql")
    with pytest.raises(AdapterError, match="being loaded"):
        core.load_adapter("sql", "sql")
    core.observe(0, 1, AdapterResult(call_id=call_id, error="rank 0: train it again"), 1.0)
    [event] = core.drain_events()
    assert "rank 0" in str(event.error)  # type: ignore[union-attr]
    load(core, "sql", "h1")
    assert core.adapters.resolve("sql") is not None


def test_a_replica_that_cannot_drop_an_adapter_is_noticed() -> None:
    core = ready_core()
    core.observe(0, 1, AdapterResult(call_id=99, error="still in use"), 1.0)
    assert core.drain_events() == [Notice(0, "still in use")]


def test_a_fatal_report_fails_what_runs_and_lets_the_replica_go() -> None:
    core = ready_core()
    submit(core, n=2)
    [out] = core.observe(0, 1, Fatal(error="out of memory"), 1.0)
    assert out.command == Shutdown()
    failed, lost = core.drain_events()
    assert isinstance(failed, RequestFailed) and isinstance(failed.error, EngineDeadError)
    assert isinstance(lost, ReplicaLost) and core.health_error == "out of memory"
    with pytest.raises(EngineDeadError, match="out of memory"):
        submit(core, "next")
    with pytest.raises(EngineDeadError):
        core.load_adapter("sql", "sql")


def test_a_replica_that_is_late_is_given_up() -> None:
    core = Orchestrator(OrchestratorOptions())
    replica = core.add_replica(0, 100.0, start_timeout=5.0)
    assert core.tick(104.9) == [] and core.health_error == "No replica is ready yet."
    assert core.tick(105.0) == [Outgoing(0, replica.epoch, Shutdown())]
    assert core.tick(105.0) == []
    core.observe(0, replica.epoch, Ready(model=fake_model(), pid=1), 106.0)
    assert core.health_error == "Replica 0 was not ready in time."


def test_a_replica_that_was_ready_in_time_is_not_late() -> None:
    core = Orchestrator(OrchestratorOptions())
    core.add_replica(0, 0.0, start_timeout=5.0)
    core.observe(0, 1, Ready(model=fake_model(), pid=1), 1.0)
    assert core.tick(10.0) == [] and core.health_error is None
    with pytest.raises(ConfigError):
        core.add_replica(0, 11.0)


def test_draining_admits_nothing_and_shutting_down_fails_the_rest() -> None:
    core = ready_core()
    submit(core)
    call_id, _ = core.load_adapter("sql", "sql")
    core.drain()
    errors: list[PeftDistError] = []
    for refused in (lambda: submit(core, "new"), lambda: core.load_adapter("json", "json")):
        with pytest.raises(EngineDeadError) as caught:
            refused()
        errors.append(caught.value)
    core.observe(0, 1, tokens("r-0", [1], 0), 1.0)
    assert len(core.drain_events()) == 1
    [out] = core.shut_down()
    assert out.command == Shutdown()
    failed, refused_load = core.drain_events()
    assert isinstance(failed, RequestFailed) and refused_load.call_id == call_id  # type: ignore[union-attr]
    assert core.shut_down() == [] and core.num_unfinished == 0


def test_before_the_first_replica_is_ready_nothing_is_admitted() -> None:
    core = Orchestrator(OrchestratorOptions())
    with pytest.raises(EngineDeadError):
        submit(core)
    model: ModelInfo = fake_model()
    core.add_replica(3, 0.0)
    core.observe(3, 1, Ready(model=model, pid=1), 0.0)
    assert core.model is model and submit(core)[0].replica_id == 3


def test_a_negative_queue_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_queue"):
        OrchestratorOptions(max_queue=-1)


def test_requests_go_to_a_warm_replica_until_the_others_are() -> None:
    core = ready_core()
    core.add_replica(1, 0.0)
    core.observe(1, 2, Ready(model=fake_model("org/base"), pid=8), 0.0)
    core.observe(0, 1, Warmth(is_warm=False, pause=0.25), 0.0)
    core.observe(1, 2, Warmth(is_warm=True), 0.0)
    sent = [unnamed(submit(core, f"r{i}", max_tokens=4))[0].replica_id for i in range(4)]
    assert sent == [1] * 4
    core.observe(0, 1, Warmth(is_warm=True), 1.0)
    assert unnamed(submit(core, "r4", max_tokens=4))[0].replica_id == 0


def test_a_replica_is_warm_when_it_says_so_and_the_next_incarnation_is_not() -> None:
    core = ready_core()
    assert [view.is_warm for view in core.replicas.views()] == [False]
    core.observe(0, 1, Warmth(is_warm=True), 1.0)
    assert [view.is_warm for view in core.replicas.views()] == [True]
    core.observe(0, 1, Warmth(is_warm=False), 2.0)
    assert [view.is_warm for view in core.replicas.views()] == [False]
    core.observe(0, 1, Warmth(is_warm=True), 3.0)
    core.lose_replica(0, 1, "gone", 4.0)
    core.observe(0, core.add_replica(0, 5.0).epoch, Ready(model=fake_model("org/base"), pid=8), 5.0)
    assert [view.is_warm for view in core.replicas.views()] == [False]
