"""Pins belong to names: what becomes of them when adapters are replaced, refused and unloaded."""

from __future__ import annotations

from peft_dist.core.adapter import AdapterSpec
from peft_dist.core.messages import AdapterResult, LoadAdapter, PinAdapter, Ready, UnloadAdapter
from tests.orchestrator.test_core import load, ready_core, unnamed
from tests.worker.fake_replica import fake_model


def test_a_pin_goes_with_its_name() -> None:
    core = ready_core()
    _, [first] = core.load_adapter("sql", "sql", pinned=True)
    assert isinstance(first.command, LoadAdapter) and first.command.pinned and not core.adapters.pinned
    spec = AdapterSpec(name="sql", content_hash="h1", path="sql", ranks={"q": 4}, num_bytes=1)
    core.observe(0, 1, AdapterResult(call_id=first.command.call_id, spec=spec), 0.0)
    assert core.adapters.pinned == {"sql"}
    _, [again] = core.load_adapter("sql", "other", replace=True)
    assert isinstance(again.command, LoadAdapter) and again.command.pinned, "what takes its place is pinned too"
    refused = core.observe(0, 1, AdapterResult(call_id=again.command.call_id, error="no"), 0.0)
    assert [out.command for out in refused] == [PinAdapter(name="sql", content_hash="h1")]
    pin, drop = unnamed(core.unload_adapter("sql"))
    assert pin.command == PinAdapter(name="sql") and isinstance(drop.command, UnloadAdapter)
    assert load(core, "sql", "h1") == [] and core.adapters.pinned == frozenset()


def test_a_pin_that_one_replica_refuses_is_taken_back_from_the_other() -> None:
    core = ready_core()
    epoch = core.add_replica(1, 0.0).epoch
    core.observe(1, epoch, Ready(model=fake_model("org/base"), pid=8), 0.0)
    call_id, commands = core.load_adapter("sql", "sql", pinned=True)
    assert [out.replica_id for out in commands] == [0, 1]
    spec = AdapterSpec(name="sql", content_hash="h1", path="sql", ranks={"q": 4}, num_bytes=1)
    assert core.observe(0, 1, AdapterResult(call_id=call_id, spec=spec), 0.0) == []
    out = core.observe(1, epoch, AdapterResult(call_id=call_id, error="no room"), 0.0)
    assert [o.command for o in out[:2]] == [PinAdapter(name="sql")] * 2
    assert [(o.replica_id, type(o.command)) for o in out[2:]] == [
        (0, UnloadAdapter)
    ] and core.adapters.pinned == frozenset()
