"""A new engine for a model as it was loaded: what goes on, what is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peft_dist.core.config import EngineConfig
from peft_dist.core.errors import ConfigError
from peft_dist.core.request import Request
from peft_dist.core.sampling_params import SamplingParams
from peft_dist.runner.replica import Replica, build_replica
from tests.tiny_models import make_model, random_adapter, target_modules

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("restart")
    model = make_model("llama", folder / "base")
    for number in range(2):
        random_adapter(model, folder / f"a{number}", 4, 8.0, target_modules("llama"), seed=number)
    return folder


@contextmanager
def replica(root: Path, **options: Any) -> Iterator[Replica]:
    config = EngineConfig(str(root / "base"), device="cpu", num_blocks=64, num_threads=1, max_loras=2, **options)
    made = build_replica(config)
    try:
        yield made
    finally:
        made.close()


def answer(made: Replica, spec: Any) -> list[int]:
    made.engine.add_request(Request("r", [5, 6, 7], GREEDY, 1, 0.0, spec))
    tokens: list[int] = []
    while made.engine.has_work:
        tokens += [token for progress in made.engine.step(1.0) for token in progress.token_ids]
    return tokens


def test_policy_and_scheduler_have_one_bound(root: Path) -> None:
    with replica(root, max_adapter_wait=2.0) as made:
        assert made.engine.scheduler.limits.max_adapter_wait == 2.0
    with replica(root, policy_profile="artifact") as made:
        assert made.engine.scheduler.limits.max_adapter_wait == float("inf")


def test_a_load_under_way_is_waited_for_and_belongs_to_nobody_afterwards(root: Path) -> None:
    with replica(root) as made:
        specs = [made.load_adapter(f"a{i}", root / f"a{i}") for i in range(2)]
        expected = answer(made, specs[0])
        read, go_on = made.store.read, threading.Event()

        def slow_read(*args: Any) -> Any:
            go_on.wait(60)
            return read(*args)

        made.store.read = slow_read  # type: ignore[method-assign]
        made.store.host.remove(specs[1].content_hash)
        made.engine.add_request(Request("waits", [5], GREEDY, 1, 0.0, specs[1]))
        made.engine.step(1.0)
        assert made.engine.scheduler.adapters.loading == [specs[1].content_hash]
        threading.Timer(0.2, go_on.set).start()
        engine = made.restart(made.config)
        assert engine is made.engine and not engine.requests and not engine.scheduler.adapters.resident
        assert answer(made, specs[0]) == expected and answer(made, specs[1]) != expected
        made.engine.scheduler.adapters.check()


def test_pins_go_on(root: Path) -> None:
    with replica(root) as made:
        spec = made.load_adapter("a0", root / "a0", pinned=True)
        engine = made.engine
        with pytest.raises(ConfigError, match="max_loras=1: 1 pinned adapters leave none of the 1 slots to others"):
            made.restart(replace(made.config, max_loras=1))
        assert made.engine is engine
        made.restart(made.config)
        while made.engine.has_work:
            made.engine.step(1.0)
        assert made.engine.scheduler.adapters.resident == [spec.content_hash]
        assert made.engine.scheduler.adapters.pins.specs == [("a0", spec)]


def test_the_old_decision_log_is_closed(root: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with replica(root, decision_log=str(first)) as made:
        answer(made, None)
        old: Any = made.engine.on_decision
        made.restart(replace(made.config, decision_log=str(second)))
        assert old._file.closed
        lines = len(first.read_bytes().splitlines())
        answer(made, None)
        new: Any = made.engine.on_decision
        assert len(first.read_bytes().splitlines()) == lines == len(second.read_bytes().splitlines())
    assert new._file.closed


def test_what_a_new_engine_reads_is_applied(root: Path) -> None:
    with replica(root) as made:
        specs = [made.load_adapter(f"a{i}", root / f"a{i}") for i in range(2)]
        made.restart(replace(made.config, max_loras=1, max_num_seqs=3, policy="merge", max_adapter_wait=0.5))
        limits = made.engine.scheduler.limits
        assert made.engine.scheduler.adapters.space.num_slots == made.model_info.max_loras == 1
        assert (limits.max_num_seqs, limits.max_adapter_wait) == (3, 0.5)
        answer(made, specs[0])
        assert made.engine.num_merged_steps
        made.restart(replace(made.config, exec_type="peft", max_loras=2))
        answer(made, specs[1])
        assert made.engine.num_merged_steps == made.engine.num_steps


@pytest.mark.parametrize(
    ("loaded", "change", "field"),
    [
        ({}, {"merge": "host"}, "merge"),
        ({}, {"max_loras": 3}, "max_loras"),
        ({}, {"block_size": 32}, "block_size"),
        ({}, {"num_blocks": 128}, "num_blocks"),
        ({}, {"model": "another"}, "model"),
        ({}, {"exec_type": "vllm"}, "exec_type"),
        ({"exec_type": "vllm"}, {"exec_type": "peft"}, "exec_type"),
        ({"policy": "fcfs"}, {"policy": "credit"}, "policy"),
        ({"policy": "fcfs"}, {"policy": "merge"}, "policy"),
        ({"merge": "off"}, {"merge": "auto", "exec_type": "peft"}, "merge"),
        ({"policy": "fcfs"}, {"policy": None, "exec_type": "peft"}, "exec_type"),
        ({}, {"decision_log": "/nowhere/log"}, "decision_log"),
    ],
)
def test_what_needs_the_model_loaded_again_is_refused_by_name(
    root: Path, loaded: dict[str, Any], change: dict[str, Any], field: str
) -> None:
    with replica(root, **loaded) as made:
        spec = made.load_adapter("a0", root / "a0")
        engine, config = made.engine, made.config
        expected = answer(made, spec)
        with pytest.raises(ConfigError, match=f"^{field}="):
            made.restart(replace(config, **change))
        assert made.engine is engine and made.config is config
        assert answer(made, spec) == expected
